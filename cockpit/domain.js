// One domain: its points, what retention wants of them, the log; backing it up now.

import { chart } from "./chart.js";
import { ask, repeat, start } from "./command.js";
import { alert, card, el, heads, label, replace } from "./dom.js";
import { log } from "./log.js";
import * as words from "./words.js";

const cockpit = window.cockpit;
const _ = cockpit.gettext;
const BUSY_SECONDS = 2;
const IDLE_SECONDS = 60;
const MOST_ROWS = 200;

export function domain(app, name, administrator) {
    const state = el("div", { "aria-live": "polite" });
    const told = el("div", { "aria-live": "polite" });
    const points = el("div", {});
    const runs = el("div", {});
    const button = el("button", { type: "button", class: "pf-v5-c-button pf-m-primary" },
                      _("Back up now"));
    const allowed = el("p", { class: "quiet" });
    let own = null;
    let drawn = "";

    const enable = () => {
        const is_allowed = administrator.allowed !== false;
        button.disabled = !is_allowed || own !== null;
        allowed.textContent = is_allowed
            ? ""
            : _("Read only: turn on administrative access to back up.");
    };

    const look = async () => {
        let known;
        try {
            known = (await ask("status", name)).domains.find(each => each.domain === name);
        } catch (error) {
            replace(state, alert("danger", _("The state is not known"), error.message));
            return IDLE_SECONDS;
        }
        if (!known) {
            replace(state, alert("warning", _("No such domain is known"), name));
            return IDLE_SECONDS;
        }
        replace(state, facts(known));
        // points are read anew only when there is another one, or fewer
        const seen = [known.point, known.all_points, known.verified, known.busy].join(" ");
        if (seen !== drawn) {
            drawn = seen;
            await Promise.all([
                draw(points, () => known.all_points || known.set ? pointsOf(name) : [none()]),
                draw(runs, () => log(name)),
            ]);
        }
        return own || known.runs.length || known.busy ? BUSY_SECONDS : IDLE_SECONDS;
    };
    let stop = () => {};

    const again = () => {
        stop();
        stop = repeat(look);
    };

    button.addEventListener("click", async () => {
        own = start("run", name);
        enable();
        replace(told, alert("info", _("The backup runs"),
                            _("Leaving this page ends it; what was there stays as it was.")));
        again();
        try {
            replace(told, ended(await own.done));
        } catch (error) {
            replace(told, alert("danger", _("Nothing was saved"), error.message));
        }
        own = null;
        drawn = "";
        enable();
        again();
    });

    administrator.addEventListener("changed", enable);
    enable();
    replace(app, el("nav", { "aria-label": _("Breadcrumb") },
                    el("a", { href: "#/" }, _("Backups"))),
            el("header", { class: "head" }, el("h1", {}, name), button), allowed,
            told, state, points, runs);
    again();
    return () => {
        stop();
        administrator.removeEventListener("changed", enable);
        own?.end();
    };
}

async function draw(node, make) {
    try {
        replace(node, await make());
    } catch (error) {
        replace(node, alert("warning", _("This could not be read"), error.message));
    }
}

function ended(report) {
    const point = report.backup?.point;
    if (!point)
        return alert("info", _("Nothing was to be saved"), report.reason);
    const problems = [...report.problems, ...point.warnings, ...report.backup.notes];
    return alert(problems.length ? "warning" : "success",
                 cockpit.format(_("Saved: $0, $1 in $2"), words.level(point.level),
                                words.size(point.stored_bytes),
                                words.span(report.backup.seconds)),
                 ...problems);
}

function facts(known) {
    const [colour, text] = words.health(known.health);
    const now = known.runs.map(run => run.doing).join(", ") || known.busy;
    const pair = (title, value) => el("div", {}, el("dt", {}, title), el("dd", {}, value));
    return [
        now
            ? el("p", { class: "doing", role: "status" },
                 cockpit.format(_("running: $0"), now))
            : null,
        card(_("State"),
             el("dl", { class: "facts" },
                pair(_("Health"), label(colour, text)),
                pair(_("Last point"), known.created
                    ? [words.time(known.created), el("div", { class: "quiet" }, cockpit.format(
                        _("$0 ago"), words.span(known.age)))]
                    : _("none yet")),
                pair(_("Next run"), known.next_run
                    ? words.time(known.next_run)
                    : _("none planned")),
                pair(_("Points"), cockpit.format(_("$0, $1"), known.all_points,
                                                 words.size(known.all_bytes))),
                pair(_("Verified"), known.verified
                    ? [cockpit.format(_("$0 of $1 points"), known.verified_points,
                                      known.all_points),
                        el("div", { class: "quiet" }, words.time(known.verified))]
                    : _("never"))),
             known.reasons.length
                 ? el("ul", { class: "reasons" }, known.reasons.map(each => el("li", {}, each)))
                 : null),
    ];
}

async function pointsOf(name) {
    const document = await ask("list", name);
    const found = document.sets.flatMap(set => set.points.map(point => ({
        ...point,
        verified: set.verified[point.id] || "",
        damage: set.damage[point.id] || "",
        wanted: set.retention[point.id] || "",
        kept: set.protections.find(each => each.point === point.id),
    })));
    const problems = document.sets.flatMap(set => [...set.problems, ...set.warnings]);
    const said = problems.length
        ? alert("danger", _("Not all points are sound"), ...problems)
        : null;
    if (!found.length) {
        return [said, none()];
    }
    return [said, card(_("Time line"), chart(found)), table(found.slice().reverse())];
}

function none() {
    return el("div", { class: "pf-v5-c-card empty" }, el("h2", {}, _("No restore point yet")),
              el("p", {}, _("The first backup saves whole disks, later ones what has changed.")));
}

function table(found) {
    const body = el("tbody", {}, found.slice(0, MOST_ROWS).map(row));
    const rest = found.slice(MOST_ROWS);
    const more = el("button", {
        type: "button", class: "pf-v5-c-button pf-m-link",
        onclick: () => {
            body.append(...rest.map(row));
            more.remove();
        },
    }, cockpit.format(_("Show $0 older points"), rest.length));
    return card(_("Points"), el("div", { class: "scroll" }, el(
        "table", { class: "pf-v5-c-table pf-m-compact" },
        heads(_("Made"), _("Level"), _("Guest"), _("Size"), _("Verified"), _("Retention")),
        body)), rest.length ? more : null);
}

function row(point) {
    const warned = point.warnings.map(each => el("div", { class: "why" }, each));
    return el(
        "tr", {},
        el("th", { scope: "row" }, words.time(point.created),
           el("div", { class: "quiet" }, point.id)),
        el("td", {}, words.level(point.level), warned),
        el("td", {}, words.consistency(point.consistency)),
        el("td", { class: "number" }, words.size(point.stored_bytes)),
        el("td", {}, proven(point)),
        el("td", {}, point.wanted,
           point.kept ? el("div", {}, label("blue", _("protected"))) : null));
}

function proven(point) {
    const test = point.boot_test;
    return [
        point.damage
            ? [label("red", _("damaged")), el("div", { class: "why" }, point.damage)]
            : el("div", {}, point.verified ? words.time(point.verified) : "–"),
        test
            ? label(test.passed ? "green" : "red",
                    test.passed ? _("it has booted") : _("it did not boot"))
            : null,
    ].flat();
}
