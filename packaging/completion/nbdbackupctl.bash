# bash completion of nbdbackupctl. Made by scripts/gen-completion, not to be edited.

# names of defined domains, without asking a libvirt that may be slow or away
_nbdbackupctl_domains() {
    local file name
    for file in /etc/libvirt/qemu/*.xml "${XDG_CONFIG_HOME:-$HOME/.config}"/libvirt/qemu/*.xml; do
        [[ -e $file ]] || continue
        name=${file##*/}
        name=${name%.xml}
        [[ $name == "$1"* ]] && COMPREPLY+=("$(printf %q "$name")")
    done
}

# names of boots that run, or are to be gone on with
_nbdbackupctl_boots() {
    local file name
    for file in /run/nbdbackup/boot/*.lock; do
        [[ -e $file ]] || continue
        name=${file##*/}
        name=${name%.lock}
        [[ $name == "$1"* ]] && COMPREPLY+=("$(printf %q "$name")")
    done
}

# kind of the value: directory, file, domain, source (a set or a domain), boot, or words to choose
# from; $2: what was typed
_nbdbackupctl_value() {
    case $1 in
    directory)
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -d -- "$2")
        ;;
    file)
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "$2")
        ;;
    source)
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -d -- "$2")
        _nbdbackupctl_domains "$2"
        ;;
    domain) _nbdbackupctl_domains "$2" ;;
    boot) _nbdbackupctl_boots "$2" ;;
    words*) mapfile -t COMPREPLY < <(compgen -W "${1#words}" -- "$2") ;;
    esac
}

_nbdbackupctl_verbs() {
    echo 'backup run restore map unmap boot mount unmount files list show verify prune protect unprotect merge remove import export estimate check checkpoints abort yield config status report timers notify log'
}

# $1: the verb, empty before it
_nbdbackupctl_options() {
    case "$1" in
    '')
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --version'
        ;;
    backup)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet -l --level -o --output --chain -i --include -x
        --exclude --raw -z --compress --no-compress --digest -t --type --push --extents --freeze
        -F --freeze-mountpoint --scratch-dir --scratch-reserve --qmp --agent -S --start-paused
        --pause --checkpoint-dir --threshold --strict --limit-rate -w --workers --wait --timeout
        --ssh-config'
        ;;
    run)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --shutdown -n --dry-run --retry --wait'
        ;;
    restore)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet -o --output --point --until --at --sequence --format
        --preallocate --compress --force -w --workers --checkpoint-dir -d --disk --in-place --pool
        --yes --as-chain --as-snapshots --since -j --jobs --bandwidth-limit --define
        --adjust-config --name --start --keep-identity --media --network --other-disks
        --trust-definition'
        ;;
    map)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet -d --disk --point --until --at --sequence --socket
        --tcp --device --tls-certificates --tls-psk --insecure --writable --prove --cache --detach
        --list'
        ;;
    unmap)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --all'
        ;;
    boot)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --point --until --at --name --keep-identity --memory
        --network --trust-definition --checkpoint-dir --detach --live-restore --define --format
        --bandwidth-limit --list --stop --resume --scratch-dir'
        ;;
    mount)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet -d --disk --point --until --at -p --partition --tool
        --kernel --replay --detach'
        ;;
    unmount)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet -l --lazy'
        ;;
    files)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet -d --disk --point --until --at -p --partition --tool
        --kernel --replay -R --recursive -f --file -z --gzip'
        ;;
    list)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --sizes --watch --interval'
        ;;
    show)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --point --tree'
        ;;
    verify)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --point --accept --all --older-than --limit -w
        --workers --checkpoint-dir --boot --boot-only --boot-wait --boot-timeout --boot-memory
        --boot-name --trust-definition --scratch-dir'
        ;;
    prune)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --all --scheduled -n --dry-run --force --wait
        --checkpoint-dir'
        ;;
    protect)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --point --wait --until --note'
        ;;
    unprotect)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --point --wait'
        ;;
    merge)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --point --bandwidth-limit --wait --checkpoint-dir'
        ;;
    remove)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --point --wait --checkpoint-dir'
        ;;
    import)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet -o --output --link --sound --name --uuid'
        ;;
    export)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --socket --since -i --include -x --exclude --freeze
        -F --freeze-mountpoint --scratch-dir --scratch-reserve --pause'
        ;;
    estimate)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet -o --output --qmp'
        ;;
    check)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet -o --output --scratch-dir --scratch-reserve
        --checkpoint-dir --qmp --agent'
        ;;
    checkpoints)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --all -o --output -n --dry-run --repair --drop
        --release --started --checkpoint-dir --qmp --wait'
        ;;
    abort)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --any --qmp --agent'
        ;;
    yield)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --journal --hosts --reason'
        ;;
    config | timers)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet'
        ;;
    status)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --nagios --warning --critical --metrics --watch
        --interval'
        ;;
    report)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --since --html --mail'
        ;;
    notify)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --print'
        ;;
    log)
        echo '-h --help -c --connect --user --password-file --config-dir --json --progress
        --runtime-dir -v --verbose -q --quiet --since -f --follow -n --lines --run -o --output'
        ;;
    esac
}

# $1: the verb, $2: how many arguments stand before this one
_nbdbackupctl_positional() {
    case "$1:$2" in
    backup:0 | run:0 | export:0 | estimate:0 | check:0 | checkpoints:0 | abort:0 | yield:0 | \
    config:1 | status:0 | report:0 | timers:0 | log:0)
        echo 'domain'
        ;;
    restore:0 | map:0 | boot:0 | mount:0 | files:0 | list:0 | show:0 | verify:0 | prune:0 | \
    protect:0 | unprotect:0 | merge:0 | remove:0)
        echo 'source'
        ;;
    files:1)
        echo 'wordsfs ls cp tar'
        ;;
    import:0)
        echo 'directory'
        ;;
    config:0)
        echo 'wordscheck show sample'
        ;;
    esac
}

# $1: the verb, $2: an option; what its value is, nothing if it takes none
_nbdbackupctl_kind() {
    case "$1:$2" in
    *:-c | *:--connect | *:--user | *:--chain | *:-i | *:--include | *:-x | *:--exclude | \
    backup:-z | backup:--compress | *:-F | *:--freeze-mountpoint | *:--scratch-reserve | \
    *:--qmp | *:--agent | *:--threshold | *:--limit-rate | *:-w | *:--workers | *:--wait | \
    *:--timeout | log:-n | *:--point | *:--until | *:--at | *:-d | *:--disk | *:--pool | \
    *:--since | *:-j | *:--jobs | *:--bandwidth-limit | *:--name | *:--socket | *:--tcp | \
    *:--device | *:--cache | *:--memory | *:-p | *:--partition | *:--interval | *:--older-than \
    | *:--limit | *:--boot-wait | *:--boot-timeout | *:--boot-memory | *:--boot-name | \
    *:--note | *:--uuid | *:--drop | *:--reason | *:--warning | *:--critical | *:--lines | \
    *:--run)
        echo 'other'
        ;;
    *:--password-file | *:--ssh-config | *:--sequence | *:--tls-psk | files:-f | *:--file | \
    *:--html)
        echo 'file'
        ;;
    *:--config-dir | *:--runtime-dir | *:-o | *:--output | *:--scratch-dir | \
    *:--checkpoint-dir | *:--tls-certificates | *:--live-restore)
        echo 'directory'
        ;;
    *:--progress)
        echo 'wordsauto line plain none'
        ;;
    backup:-l | *:--level)
        echo 'wordsauto full inc diff copy'
        ;;
    *:--digest)
        echo 'wordssha256 blake3 xxh128'
        ;;
    *:-t | *:--type)
        echo 'wordsstream raw'
        ;;
    *:--extents)
        echo 'wordsown nbdinfo'
        ;;
    *:--freeze)
        echo 'wordsauto require never'
        ;;
    *:--format)
        echo 'wordsqcow2 raw'
        ;;
    *:--media | *:--other-disks)
        echo 'wordskeep remove'
        ;;
    restore:--network)
        echo 'wordskeep down none'
        ;;
    boot:--network)
        echo 'wordsnone down keep'
        ;;
    *:--stop | *:--resume)
        echo 'boot'
        ;;
    *:--tool)
        echo 'wordsfuse2fs grub-mount guestmount'
        ;;
    *:--hosts)
        echo 'wordsprepare restore migrate started reconnect release'
        ;;
    esac
}

_nbdbackupctl() {
    local cur=${COMP_WORDS[COMP_CWORD]} previous='' verb='' positional=0 word kind i
    COMPREPLY=()
    ((COMP_CWORD > 0)) && previous=${COMP_WORDS[COMP_CWORD - 1]}
    # readline cuts words at "=" and ":": --level=in comes as three, qemu:///system, too
    if [[ $cur == = ]]; then
        cur=''
    elif [[ $previous == = ]]; then
        previous=${COMP_WORDS[COMP_CWORD - 2]}
    fi
    for ((i = 1; i < COMP_CWORD; i++)); do
        word=${COMP_WORDS[i]}
        if [[ $word == [=:] ]]; then
            ((i++))
        elif [[ $word == -* ]]; then
            # a value follows, unless it may be left out and is
            kind=$(_nbdbackupctl_kind "$verb" "$word")
            [[ -n $kind && ${COMP_WORDS[i + 1]} != [=-]* ]] && ((i++))
        elif [[ -z $verb ]]; then
            verb=$word
        else
            ((positional++))
        fi
    done
    if [[ $previous == -* && $cur != -* ]]; then
        kind=$(_nbdbackupctl_kind "$verb" "$previous")
        if [[ -n $kind ]]; then
            _nbdbackupctl_value "$kind" "$cur"
            return
        fi
    fi
    if [[ $cur == -* ]]; then
        _nbdbackupctl_value "words$(_nbdbackupctl_options "$verb")" "$cur"
    elif [[ -z $verb ]]; then
        _nbdbackupctl_value "words$(_nbdbackupctl_verbs)" "$cur"
    else
        _nbdbackupctl_value "$(_nbdbackupctl_positional "$verb" "$positional")" "$cur"
    fi
}

complete -F _nbdbackupctl nbdbackupctl
