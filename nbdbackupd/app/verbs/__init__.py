"""One module for each verb: ``register`` adds its parser, ``run`` carries it out."""

from nbdbackupd.app.verbs import (
    abort,
    backup,
    catalog,
    check,
    checkpoints,
    config,
    estimate,
    give_way,
    log,
    notify,
    restore,
    run,
    status,
    timers,
    verify,
)

ALL = (
    backup,
    run,
    restore,
    catalog,
    verify,
    estimate,
    check,
    checkpoints,
    abort,
    give_way,
    config,
    status,
    timers,
    notify,
    log,
)
