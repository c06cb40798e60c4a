// Making elements. What a text holds never becomes markup: nothing here reads HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
    for (const [name, value] of Object.entries(attributes)) {
        if (name.startsWith("on"))
            node.addEventListener(name.slice(2), value);
        else if (value === true)
            node.setAttribute(name, "");
        else if (value !== false && value !== null)
            node.setAttribute(name, value);
    }
    // strings become text nodes
    node.append(...children.flat().filter(each => each !== null));
    return node;
}

// Attributes "onclick" and the like are functions; false and null leave one out.
export function el(tag, attributes = {}, ...children) {
    return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
    return fill(document.createElementNS(SVG, tag), attributes, children);
}

// Put children in the place of all that a node holds; the focus stays on what has the same
// data-key.
export function replace(node, ...children) {
    const key = node.contains(document.activeElement) && document.activeElement.dataset.key;
    node.replaceChildren(...children.flat().filter(each => each !== null));
    node.removeAttribute("aria-busy");
    if (key)
        [...node.querySelectorAll("[data-key]")].find(each => each.dataset.key === key)?.focus();
}

export function alert(kind, title, ...lines) {
    return el("div", { class: `pf-v5-c-alert pf-m-inline pf-m-${kind}`,
                       role: kind === "danger" ? "alert" : "status" },
              el("h4", { class: "pf-v5-c-alert__title" }, title),
              lines.filter(each => each).map(each => el("p", {}, each)));
}

export function label(colour, text) {
    return el("span", { class: `pf-v5-c-label pf-m-${colour}` }, text);
}

export function card(title, ...children) {
    return el("section", { class: "pf-v5-c-card" },
              el("h2", { class: "pf-v5-c-card__title" }, title), ...children);
}

export function heads(...titles) {
    return el("thead", {}, el("tr", {},
                              titles.map(each => el("th", { scope: "col" }, each))));
}
