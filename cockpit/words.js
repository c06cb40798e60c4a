// How values of the JSON documents are written for people.

const cockpit = window.cockpit;
const _ = cockpit.gettext;
const UNITS = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];

export function size(bytes) {
    let unit = 0;
    while (bytes >= 1024 && unit < UNITS.length - 1) {
        bytes /= 1024;
        unit += 1;
    }
    return `${bytes.toFixed(unit && bytes < 100 ? 1 : 0)} ${UNITS[unit]}`;
}

export function time(text) {
    if (!text)
        return "–";
    const language = (cockpit.language || "en").replace("_", "-");
    return new Date(text).toLocaleString(language, { dateStyle: "medium", timeStyle: "short" });
}

export function span(seconds) {
    if (seconds === null)
        return "–";
    if (seconds < 60)
        return cockpit.format(_("$0 s"), Math.max(0, Math.floor(seconds)));
    if (seconds < 7200)
        return cockpit.format(_("$0 min"), Math.floor(seconds / 60));
    if (seconds < 172800)
        return cockpit.format(_("$0 h"), Math.floor(seconds / 3600));
    return cockpit.format(_("$0 days"), Math.floor(seconds / 86400));
}

const HEALTH = {
    ok: ["green", _("ok")],
    warning: ["orange", _("warning")],
    critical: ["red", _("critical")],
    unknown: ["grey", _("unknown")],
};

// Colour and word.
export function health(value) {
    return HEALTH[value] || ["grey", value];
}

const LEVELS = { full: _("full"), inc: _("increment"), diff: _("differential"), copy: _("copy") };

export function level(value) {
    return LEVELS[value] || value || "–";
}

const CONSISTENCY = {
    offline: _("off"),
    filesystem: _("file systems frozen"),
    paused: _("paused"),
    crash: _("as after a crash"),
};

export function consistency(value) {
    return CONSISTENCY[value] || value;
}
