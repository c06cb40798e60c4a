// The page "Backups" of Cockpit: which view is shown, by the address, and when it is read anew.

import { el, replace } from "./dom.js";
import { domains } from "./domains.js";
import { domain } from "./domain.js";
import { follow } from "./theme.js";

const cockpit = window.cockpit;
const _ = cockpit.gettext;
const app = document.getElementById("app");
const administrator = cockpit.permission({ admin: true });
let leave = () => {};

// A view draws into `app` and returns what ends it: its timers and commands.
function show() {
    leave();
    const [kind, name] = cockpit.location.path;
    if (kind === "domain" && name)
        leave = domain(app, name, administrator);
    else if (kind === undefined)
        leave = domains(app);
    else
        replace(app, el("p", { class: "empty" }, _("There is no such page.")));
}

follow();
document.documentElement.lang = (cockpit.language || "en").replace("_", "-");
document.title = _("Backups");
cockpit.addEventListener("locationchanged", show);
show();
