// What was logged of a domain, run by run.

import { ask } from "./command.js";
import { card, el } from "./dom.js";
import * as words from "./words.js";

const cockpit = window.cockpit;
const _ = cockpit.gettext;
const LINES = "500";
const WARNING = 4;

export async function log(name) {
    const { entries } = await ask("log", name, "-n", LINES);
    const runs = new Map();
    for (const each of entries) {
        const run = each.fields.run || "";
        runs.set(run, [...(runs.get(run) || []), each]);
    }
    if (!runs.size)
        return card(_("Log"), el("p", { class: "empty" }, _("Nothing was logged of it yet.")));
    return card(_("Log"), [...runs.values()].reverse().map(one));
}

function one(entries) {
    const last = entries[entries.length - 1];
    const bad = entries.some(each => each.priority <= WARNING);
    return el("details", {},
              el("summary", { class: bad ? "bad" : "" }, cockpit.format(
                  _("$0: $1"), words.time(entries[0].time), last.message.split("\n")[0])),
              el("ol", { class: "log" }, entries.map(each => el(
                  "li", { class: each.priority <= WARNING ? "bad" : "" },
                  el("time", { datetime: each.time }, words.time(each.time)), " ",
                  each.message))));
}
