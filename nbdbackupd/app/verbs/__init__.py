"""One module for each verb: ``register`` adds its parser, ``run`` carries it out."""

from nbdbackupd.app.verbs import abort, backup, catalog, estimate, restore, verify

ALL = (backup, restore, catalog, verify, estimate, abort)
