// All domains: how well each is protected.

import { ask, repeat } from "./command.js";
import { alert, card, el, heads, label, replace } from "./dom.js";
import * as words from "./words.js";

const cockpit = window.cockpit;
const _ = cockpit.gettext;
const RANK = ["critical", "warning", "unknown", "ok"];
const BUSY_SECONDS = 3;
const IDLE_SECONDS = 60;

export function domains(app) {
    let sought = "";
    let known = null;
    const list = el("div", {});
    const search = el("input", {
        type: "search", class: "pf-v5-c-form-control", "aria-label": _("Filter by name"),
        placeholder: _("Filter by name"),
        oninput: () => {
            sought = search.value.toLowerCase();
            if (known)
                replace(list, table(known, sought));
        },
    });
    const told = el("div", { "aria-live": "polite" });
    replace(app, el("header", { class: "head" }, el("h1", {}, _("Backups")), search), told, list);
    replace(list, el("p", { class: "empty" }, _("Asking nbdbackupctl …")));
    app.setAttribute("aria-busy", "true");

    return repeat(async () => {
        try {
            known = await ask("status");
        } catch (error) {
            replace(told, alert("danger", _("The state of the backups is not known"),
                                error.message));
            if (!known)
                replace(list);
            return IDLE_SECONDS;
        } finally {
            app.removeAttribute("aria-busy");
        }
        replace(told, summary(known));
        replace(list, table(known, sought));
        return known.domains.some(each => each.runs.length) ? BUSY_SECONDS : IDLE_SECONDS;
    });
}

function summary(known) {
    const counts = RANK.map(kind => [kind, known.domains.filter(each => each.health === kind)])
            .filter(([, found]) => found.length)
            .map(([kind, found]) => {
                const [colour, text] = words.health(kind);
                return label(colour, `${found.length} ${text}`);
            });
    const space = known.file_systems.map(each => el("span", { class: "quiet" }, cockpit.format(
        _("$0 of $1 free in $2"), words.size(each.free), words.size(each.size), each.path)));
    return [el("p", { class: "summary" }, counts, space),
        known.notes.length
            ? alert("warning", _("Not everything could be asked"), ...known.notes)
            : null];
}

function table(known, sought) {
    if (!known.domains.length) {
        return el("div", { class: "empty" }, el("h2", {}, _("No domains")),
                  el("p", {}, _("Neither libvirt, nor the configuration, nor the repository " +
                                "knows any. Define a domain, or set repository.path in " +
                                "/etc/nbdbackup/nbdbackup.yaml.")));
    }
    const rows = known.domains.filter(each => each.domain.toLowerCase().includes(sought))
            .sort((a, b) => RANK.indexOf(a.health) - RANK.indexOf(b.health) ||
                            a.domain.localeCompare(b.domain));
    if (!rows.length)
        return el("p", { class: "empty" }, _("No domain has such a name."));
    return card(_("Domains"), el("div", { class: "scroll" }, el(
        "table", { class: "pf-v5-c-table pf-m-compact" },
        heads(_("Domain"), _("Health"), _("Last point"), _("Age"), _("Next run"), _("Size")),
        el("tbody", {}, rows.map(row)))));
}

function row(each) {
    const [colour, text] = words.health(each.health);
    const address = "#/" + ["domain", each.domain].map(encodeURIComponent).join("/");
    const now = each.runs.map(run => run.doing).join(", ") || each.busy;
    return el(
        "tr", {},
        el("th", { scope: "row" },
           el("a", { href: address, "data-key": each.domain }, each.domain),
           now ? el("div", { class: "doing" }, cockpit.format(_("running: $0"), now)) : null),
        el("td", {}, label(colour, text),
           each.reasons.length ? el("div", { class: "why" }, each.reasons[0]) : null),
        el("td", {}, words.time(each.created),
           each.level ? el("div", { class: "quiet" }, words.level(each.level)) : null),
        el("td", {}, words.span(each.age)),
        el("td", {}, words.time(each.next_run)),
        el("td", { class: "number" }, words.size(each.all_bytes)));
}
