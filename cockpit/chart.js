// Points on a time line: a bar is what a point takes, the sign below it its level, the colour how
// the guest was. The table below has the same in words.

import { el, svg } from "./dom.js";
import * as words from "./words.js";

const cockpit = window.cockpit;
const _ = cockpit.gettext;
const WIDTH = 1000;
const LEFT = 76;
const RIGHT = 24;
const TOP = 14;
const BASE = 150;
const SIGNS = 172;
const HEIGHT = 216;
const SHAPES = {
    full: "M-6,-6h12v12h-12z",
    inc: "M0,-5a5,5 0 1,0 0.01,0z",
    diff: "M0,-7l7,7l-7,7l-7,-7z",
    copy: "M0,-7l7,12h-14z",
};

export function chart(points) {
    const times = points.map(each => Date.parse(each.created));
    const first = Math.min(...times);
    const length = Math.max(...times) - first;
    const most = Math.max(1, ...points.map(each => each.stored_bytes));
    const place = moment => length
        ? LEFT + 12 + (moment - first) / length * (WIDTH - LEFT - RIGHT - 24)
        : (LEFT + WIDTH - RIGHT) / 2;
    const text = (x, y, anchor, value) => svg("text", { x, y, "text-anchor": anchor }, value);
    const line = (y, kind) => svg("line", { x1: LEFT, x2: WIDTH - RIGHT, y1: y, y2: y,
                                            class: kind });
    const drawing = svg(
        "svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", class: "chart",
                 "aria-label": cockpit.format(_("$0 points from $1 to $2"), points.length,
                                              words.time(points[0].created),
                                              words.time(points[points.length - 1].created)) },
        line(TOP, "grid"), line((TOP + BASE) / 2, "grid"), line(BASE, "axis"),
        text(LEFT - 8, TOP + 4, "end", words.size(most)),
        text(LEFT - 8, (TOP + BASE) / 2 + 4, "end", words.size(most / 2)),
        text(LEFT - 8, BASE + 4, "end", "0"),
        points.map((each, number) => one(each, place(times[number]), each.stored_bytes / most)),
        length
            ? [text(LEFT, HEIGHT - 8, "start", words.time(points[0].created)),
                text(WIDTH - RIGHT, HEIGHT - 8, "end",
                     words.time(points[points.length - 1].created))]
            : [text(place(first), HEIGHT - 8, "middle", words.time(points[0].created))]);
    return el("figure", {}, drawing, legend(points));
}

function one(point, x, share) {
    const height = Math.max(2, share * (BASE - TOP));
    return svg(
        "g", { class: `point ${point.consistency}` },
        svg("title", {}, [words.time(point.created), words.level(point.level),
            words.consistency(point.consistency), words.size(point.stored_bytes)].join(", ")),
        svg("rect", { x: x - 4, y: BASE - height, width: 8, height, class: "bar" }),
        svg("path", { d: SHAPES[point.level] || SHAPES.inc, class: "sign",
                      transform: `translate(${x},${SIGNS})` }));
}

function legend(points) {
    const used = name => [...new Set(points.map(each => each[name]))];
    return el(
        "figcaption", { class: "legend" },
        used("level").map(each => el("span", {}, svg(
            "svg", { viewBox: "-8 -8 16 16", class: "key", "aria-hidden": "true" },
            svg("path", { d: SHAPES[each] || SHAPES.inc, class: "sign" })), words.level(each))),
        used("consistency").map(each => el("span", {}, svg(
            "svg", { viewBox: "-8 -8 16 16", class: "key", "aria-hidden": "true" },
            svg("g", { class: `point ${each}` },
                svg("rect", { x: -6, y: -6, width: 12, height: 12, class: "bar" }))),
                                             words.consistency(each))));
}
