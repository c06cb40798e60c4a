// Light or dark, as the user chose in Cockpit's menu; its shell tells pages by the storage.

const KEY = "shell:style";
const system = window.matchMedia("(prefers-color-scheme: dark)");

function apply() {
    const chosen = window.localStorage.getItem(KEY) || "auto";
    const dark = chosen === "dark" || (chosen === "auto" && system.matches);
    document.documentElement.classList.toggle("pf-v5-theme-dark", dark);
}

export function follow() {
    window.addEventListener("storage", event => {
        if (event.key === KEY)
            apply();
    });
    // the frame of the shell itself
    window.addEventListener("cockpit-style", apply);
    system.addEventListener("change", apply);
    apply();
}
