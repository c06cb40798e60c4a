# install - what a package consists of, for all packagings:
#   make install DESTDIR=... [PREFIX=/usr] [UNITDIR=...] [ZSHDIR=...] [APPARMOR=no]
# install-restore: the programs, all that a restore needs. install-appliance: what lets systemd and
# libvirt call them. install-cockpit: the page of Cockpit. There is nothing to build.
DESTDIR =
PREFIX = /usr
SYSCONFDIR = /etc
UNITDIR = $(PREFIX)/lib/systemd/system
GENERATORDIR = $(PREFIX)/lib/systemd/system-generators
LIBDIR = $(PREFIX)/lib/nbdbackup
SHARE = $(PREFIX)/share
ZSHDIR = $(SHARE)/zsh/site-functions
APPARMOR = yes

INSTALL_DIR = install -d -m 755
INSTALL_DATA = install -m 644
INSTALL_PROGRAM = install -m 755

modules := $(shell find nbdbackupd -type f -not -path '*/__pycache__/*' -not -name '*.pyc')
units := $(wildcard units/*.service units/*.timer units/*.path units/*.slice)
# fill in where the modules are: input, output
fill = sed 's|@libdir@|$(LIBDIR)|' $(1) > $(2) && chmod 755 $(2)

all:
	@echo "nothing to build: see 'install'"

install: install-restore install-appliance install-cockpit

install-restore:
	set -e; for module in $(modules); do \
	    $(INSTALL_DIR) "$(DESTDIR)$(LIBDIR)/$$(dirname "$$module")"; \
	    $(INSTALL_DATA) "$$module" "$(DESTDIR)$(LIBDIR)/$$module"; \
	done
	$(INSTALL_DIR) $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(SHARE)/man/man1 $(DESTDIR)$(SHARE)/man/man5 \
	    $(DESTDIR)$(SHARE)/bash-completion/completions $(DESTDIR)$(ZSHDIR)
	$(call fill,packaging/common/nbdbackupctl.in,$(DESTDIR)$(PREFIX)/bin/nbdbackupctl)
	$(INSTALL_DATA) docs/man/*.1 $(DESTDIR)$(SHARE)/man/man1/
	$(INSTALL_DATA) docs/man/*.5 $(DESTDIR)$(SHARE)/man/man5/
	$(INSTALL_DATA) packaging/completion/nbdbackupctl.bash \
	    $(DESTDIR)$(SHARE)/bash-completion/completions/nbdbackupctl
	$(INSTALL_DATA) packaging/completion/_nbdbackupctl $(DESTDIR)$(ZSHDIR)/

install-appliance:
	$(INSTALL_DIR) $(DESTDIR)$(UNITDIR)/multi-user.target.wants $(DESTDIR)$(LIBDIR) \
	    $(DESTDIR)$(UNITDIR)/libvirt-guests.service.d \
	    $(DESTDIR)$(PREFIX)/lib/tmpfiles.d \
	    $(DESTDIR)$(SYSCONFDIR)/nbdbackup/domains.d \
	    $(DESTDIR)$(SYSCONFDIR)/libvirt/hooks/qemu.d
	$(INSTALL_DATA) $(units) $(DESTDIR)$(UNITDIR)/
	$(INSTALL_DATA) units/libvirt-guests.service.d/nbdbackup.conf \
	    $(DESTDIR)$(UNITDIR)/libvirt-guests.service.d/
	ln -sf ../nbdbackup-pending.service ../nbdbackup-timers.path \
	    $(DESTDIR)$(UNITDIR)/multi-user.target.wants/
	$(INSTALL_PROGRAM) hooks/catch-up hooks/load-hook packaging/common/after-install \
	    packaging/common/before-remove $(DESTDIR)$(LIBDIR)/
	$(INSTALL_PROGRAM) hooks/qemu $(DESTDIR)$(LIBDIR)/hook
	$(INSTALL_PROGRAM) hooks/qemu.d/nbdbackup $(DESTDIR)$(SYSCONFDIR)/libvirt/hooks/qemu.d/
	$(INSTALL_DATA) etc/nbdbackup/nbdbackup.yaml etc/nbdbackup/hook.conf \
	    $(DESTDIR)$(SYSCONFDIR)/nbdbackup/
	$(INSTALL_DATA) packaging/common/nbdbackup.tmpfiles \
	    $(DESTDIR)$(PREFIX)/lib/tmpfiles.d/nbdbackup.conf
ifeq ($(APPARMOR),yes)
	$(INSTALL_DIR) $(DESTDIR)$(SYSCONFDIR)/apparmor.d/abstractions/libvirt-qemu.d
	$(INSTALL_DATA) packaging/common/libvirt-qemu.apparmor \
	    $(DESTDIR)$(SYSCONFDIR)/apparmor.d/abstractions/libvirt-qemu.d/nbdbackup
endif
ifneq ($(wildcard packaging/common/nbdbackup-generator.in),)
	$(INSTALL_DIR) $(DESTDIR)$(GENERATORDIR)
	$(call fill,packaging/common/nbdbackup-generator.in,$(DESTDIR)$(GENERATORDIR)/nbdbackup-generator)
endif
ifneq ($(wildcard packaging/common/nbdbackup.catalog),)
	$(INSTALL_DIR) $(DESTDIR)$(PREFIX)/lib/systemd/catalog
	$(INSTALL_DATA) packaging/common/nbdbackup.catalog $(DESTDIR)$(PREFIX)/lib/systemd/catalog/
endif

install-cockpit:
	$(INSTALL_DIR) $(DESTDIR)$(SHARE)/cockpit/nbdbackup
	$(INSTALL_DATA) cockpit/manifest.json cockpit/index.html cockpit/*.css cockpit/*.js \
	    $(DESTDIR)$(SHARE)/cockpit/nbdbackup/

.PHONY: all install install-restore install-appliance install-cockpit
