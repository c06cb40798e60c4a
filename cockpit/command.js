// Asking the host: each question is one run of nbdbackupctl, each answer its JSON document.

const cockpit = window.cockpit;
const _ = cockpit.gettext;

// Start a command. `done` resolves to its document, whatever the exit status, which also says how
// well domains are; it rejects with an Error whose message is the command's own, if there is none.
// `end` ends it.
export function start(...words) {
    const process = cockpit.spawn(["nbdbackupctl", "--json", ...words],
                                  { superuser: "try", err: "message" });
    let out = "";
    process.stream(text => { out += text });
    const done = new Promise((resolve, reject) => {
        const answer = failure => {
            let document = null;
            try {
                document = JSON.parse(out);
            } catch (_error) {
                // no document: the failure tells why
            }
            if (document?.error)
                reject(new Error(document.error.message));
            else if (document)
                resolve(document);
            else
                reject(new Error(words_of(failure)));
        };
        process.then(() => answer(null), answer);
    });
    return { done, end: () => process.close("terminated") };
}

export function ask(...words) {
    return start(...words).done;
}

function words_of(failure) {
    if (failure?.problem === "not-found")
        return _("nbdbackupctl is not installed: install the package nbdbackup-restore");
    if (failure?.problem === "access-denied")
        return _("This needs administrative access: turn it on at the top of the page");
    return failure?.message || _("nbdbackupctl has said nothing");
}

// Call `look`, and again so many seconds after it is done as it returns; not while nobody sees the
// page. Returns what ends it.
export function repeat(look) {
    let timer = 0;
    let ended = false;
    const again = async () => {
        const seconds = cockpit.hidden ? 1 : await look();
        if (!ended)
            timer = window.setTimeout(again, seconds * 1000);
    };
    again();
    return () => {
        ended = true;
        window.clearTimeout(timer);
    };
}
