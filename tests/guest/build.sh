#!/bin/bash
# Builds the Debian 12 guest that tests and `make demo` run:
#
#     tests/guest/build.sh OUTDIR
#
# OUTDIR then holds debian.raw (a sparse ext4 file system without partition table), vmlinuz,
# initrd.img and cmdline (the kernel command line to boot them with). Does nothing when these are
# already there and were built by this very script. Works as root, and as a plain user where
# mmdebstrap can use user namespaces. Everything comes from the host's Debian mirror.
#
# The guest: systemd, udev, qemu-guest-agent, PostgreSQL on its default cluster, a login on the
# serial console as root without password. Trimmed to boot fast under software emulation:
# * linux-image-amd64, not the cloud kernel, because only it has the VM generation id driver;
#   drivers no virtual machine has are left out of the image;
# * tiny-initramfs, a C program that loads the modules named below and mounts the root; the
#   shell scripts of initramfs-tools take longer than all the rest of the boot.
set -euo pipefail

[ $# -eq 1 ] || { echo "usage: $0 OUTDIR" >&2; exit 2; }
mkdir -p "$1"
out=$(cd "$1" && pwd)
suite=bookworm
size=2G
stamp=$(sha256sum <"$0" | cut -d' ' -f1)

is_current() {
    [ "$(cat "$out/stamp" 2>/dev/null)" = "$stamp" ] &&
        [ -s "$out/debian.raw" ] && [ -s "$out/vmlinuz" ] && [ -s "$out/initrd.img" ]
}

is_current && exit 0
# Two builds at once (two test runs in one checkout): the second waits and finds the first's work.
exec 9>"$out/lock"
flock 9
is_current && exit 0
rm -rf "$out/stamp" "$out"/build.??????
echo "building the Debian 12 guest image in $out (about 1.5 minutes, once)" >&2

for tool in mmdebstrap mke2fs; do
    PATH=$PATH:/sbin:/usr/sbin command -v $tool >/dev/null ||
        { echo "$0: $tool is missing: run 'make setup'" >&2; exit 1; }
done

# The mirror lines of the host's own Debian 12, or Debian's mirror network on any other host.
mirrors() {
    local lines
    lines=$(apt-get indextargets --format 'deb $(REPO_URI) $(RELEASE) $(COMPONENT)' \
        'Created-By: Packages' 'Origin: Debian' 2>/dev/null |
        grep -E "^deb [^ ]+ $suite(-updates|-security)? main$" | sort -u || true)
    if grep -q " $suite main$" <<<"$lines"; then
        echo "$lines"
    else
        printf 'deb http://deb.debian.org/%s main\n' "debian $suite" "debian $suite-updates" \
            "debian-security $suite-security"
    fi
}

# What the host's apt needs to reach its mirror, the guest's needs too while it is built.
apt_options() {
    apt-config dump --format '%f "%v";%n' Acquire 2>/dev/null |
        grep -iE '^Acquire::https?::(proxy|cainfo|caproxy|timeout)' || true
}

packages=(
    systemd-sysv udev acpid util-linux e2fsprogs kmod
    qemu-guest-agent postgresql
    tiny-initramfs linux-image-amd64
)

# Files no test reads. libLLVM is PostgreSQL's JIT compiler, off in the configuration below.
excludes=(
    '/usr/share/doc/*' '/usr/share/man/*' '/usr/share/info/*' '/usr/share/locale/*'
    '/usr/share/i18n/*' '/usr/lib/postgresql/*/lib/bitcode/*'
    '/usr/lib/x86_64-linux-gnu/libLLVM*' '/usr/share/lintian/*' '/usr/share/bug/*'
)
drivers='accessibility|bluetooth|cdrom|comedi|cpufreq|crypto|dma|edac|extcon|firewire|gnss|gpu|hid'
drivers+='|hwmon|i2c|iio|infiniband|input|isdn|leds|media|memstick|message|mfd|misc|mmc|mtd|nfc|ntb'
drivers+='|nvme|parport|pcmcia|platform|power|powercap|pwm|rtc|scsi|soundwire|spi|ssb|staging|target'
drivers+='|thunderbolt|uio|usb|vdpa|vfio|vhost|video|w1|watchdog|bcma|ata|net/ethernet|net/wireless'
drivers+='|net/usb|net/wan|net/can|net/fddi|net/hamradio|net/ieee802154|net/ppp|net/slip|net/phy'
drivers+='|net/plip|net/arcnet|net/wwan|net/dsa|net/hippi|net/mdio|net/pcs'
IFS='|' read -ra drivers <<<"$drivers"
for d in "${drivers[@]}"; do excludes+=("/lib/modules/*/kernel/drivers/$d/*"); done
for d in sound arch/x86/crypto arch/x86/kvm net/wireless net/bluetooth net/mac80211 fs/ocfs2 \
    fs/gfs2 fs/ceph fs/smb fs/nfs fs/nfsd fs/afs fs/reiserfs fs/jfs fs/f2fs fs/ubifs fs/nilfs2 fs/orangefs; do
    excludes+=("/lib/modules/*/kernel/$d/*")
done
# A build that a power cut spoils is built again: dpkg need not sync each of 20,000 files, which takes
# minutes on a busy disk. Its configuration is removed from the guest below.
dpkg_options=(--dpkgopt=force-unsafe-io)
for e in "${excludes[@]}"; do dpkg_options+=(--dpkgopt="path-exclude=$e"); done
# psql's package fails to install without its manual page.
dpkg_options+=(--dpkgopt='path-include=/usr/share/doc/*/copyright'
    --dpkgopt='path-include=/usr/share/postgresql/*/man/*')

# Before the packages: how the initial RAM disk is made.
prepare=$(cat <<'HOOK'
set -e
mkdir -p "$1/etc/tiny-initramfs"
cat >"$1/etc/tiny-initramfs/tiny-initramfs.conf" <<E
AUTO_MODULES=no
MICROCODE=no
INCLUDE_MODULES=virtio_pci,virtio_blk,virtio_console,virtio_rng,ext4
E
HOOK
)

configure=$(cat <<'HOOK'
set -e
echo debian >"$1/etc/hostname"
printf '127.0.0.1 localhost debian\n::1 localhost\n' >"$1/etc/hosts"
echo '/dev/vda / ext4 noatime 0 0' >"$1/etc/fstab"
chroot "$1" passwd -q -d root
# An empty id is filled at the first boot, so that no two guests share one.
: >"$1/etc/machine-id"
rm -f "$1/etc/resolv.conf" "$1/var/lib/dbus/machine-id"
mkdir -p "$1/etc/systemd/journald.conf.d" "$1/etc/systemd/system.conf.d"
# A journal in memory: a guest that does nothing writes nothing to its disk.
printf '[Journal]\nStorage=volatile\nRuntimeMaxUse=8M\n' >"$1/etc/systemd/journald.conf.d/tidemark.conf"
# A boot under emulation on a busy host is slow, not stuck.
printf '[Manager]\nDefaultTimeoutStopSec=20s\nDefaultTimeoutStartSec=10min\n' >"$1/etc/systemd/system.conf.d/tidemark.conf"
# What never needs to start: timers, things for hardware or networks, and every generator but
# fstab's and PostgreSQL's.
for unit in apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer e2scrub_all.timer \
    fstrim.timer systemd-tmpfiles-clean.timer e2scrub_reap.service kmod-static-nodes.service \
    modprobe@.service systemd-hwdb-update.service systemd-journal-catalog-update.service \
    systemd-journal-flush.service systemd-pstore.service systemd-random-seed.service \
    systemd-remount-fs.service systemd-sysusers.service systemd-update-utmp.service \
    systemd-update-utmp-runlevel.service systemd-user-sessions.service systemd-binfmt.service \
    systemd-network-generator.service systemd-ask-password-wall.path \
    systemd-ask-password-console.path proc-sys-fs-binfmt_misc.automount dev-hugepages.mount \
    dev-mqueue.mount sys-kernel-debug.mount sys-kernel-tracing.mount sys-kernel-config.mount \
    sys-fs-fuse-connections.mount getty@tty1.service getty-static.service systemd-initctl.socket acpid.path; do
    ln -sf /dev/null "$1/etc/systemd/system/$unit"
done
mkdir -p "$1/etc/systemd/system-generators"
for path in "$1"/lib/systemd/system-generators/*; do
    case ${path##*/} in
    systemd-fstab-generator | postgresql-generator) ;;
    *) ln -s /dev/null "$1/etc/systemd/system-generators/${path##*/}" ;;
    esac
done
# Cold-plug the devices this guest can have, not its 300 virtual consoles and platform devices.
mkdir -p "$1/etc/systemd/system/systemd-udev-trigger.service.d"
cat >"$1/etc/systemd/system/systemd-udev-trigger.service.d/tidemark.conf" <<E
[Service]
ExecStart=
ExecStart=-udevadm trigger --action=add --subsystem-match=virtio-ports --subsystem-match=block \\
    --subsystem-match=net --subsystem-match=virtio --subsystem-match=pci --subsystem-match=acpi
ExecStart=-udevadm trigger --action=add --subsystem-match=tty --sysname-match=ttyS0
E
# The power button without logind and D-Bus.
printf 'event=button/power\naction=/bin/systemctl poweroff\n' >"$1/etc/acpi/events/powerbtn"
ln -sf /lib/systemd/system/acpid.service "$1/etc/systemd/system/multi-user.target.wants/"
# PostgreSQL by its own program; Debian's wrapper is Perl, slow to start under emulation.
mkdir -p "$1/etc/systemd/system/postgresql@15-main.service.d"
cat >"$1/etc/systemd/system/postgresql@15-main.service.d/tidemark.conf" <<E
[Service]
Type=notify
User=postgres
PIDFile=
ExecStart=
ExecStart=/usr/lib/postgresql/15/bin/postgres -D /var/lib/postgresql/15/main -c config_file=/etc/postgresql/15/main/postgresql.conf
ExecStop=
KillMode=mixed
KillSignal=SIGINT
ExecReload=
E
conf=$(echo "$1"/etc/postgresql/*/main)
mkdir -p "$conf/conf.d"
cat >"$conf/conf.d/tidemark.conf" <<E
fsync = on
jit = off
shared_buffers = 16MB
max_connections = 20
autovacuum_naptime = 10min
E
chroot "$1" systemctl -q enable serial-getty@ttyS0.service
rm -rf "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/* "$1"/var/log/* "$1"/etc/apt/apt.conf.d/*mmdebstrap \
    "$1"/etc/dpkg/dpkg.cfg.d/*mmdebstrap "$1"/var/cache/debconf/*-old "$1"/usr/sbin/policy-rc.d
mkdir -p "$1/var/log/postgresql"
chroot "$1" chown postgres:adm /var/log/postgresql
HOOK
)

# The image is made inside the build's own mounts, in memory, because in a user namespace nothing
# else can be written to. The bind mount is not recursive: it shows the tree without /proc, /sys,
# /dev and the image itself. lazy_*_init=0: no background writes after the first mount.
image=$(cat <<HOOK
set -e
export PATH=\$PATH:/usr/sbin:/sbin
mount -t tmpfs -o size=80% tidemark "\$1/mnt"
mkdir "\$1/mnt/root"
mount --bind "\$1" "\$1/mnt/root"
mke2fs -q -t ext4 -L tidemark -m 0 -e remount-ro -O ^orphan_file,^metadata_csum_seed \\
    -E lazy_itable_init=0,lazy_journal_init=0,nodiscard -d "\$1/mnt/root" "\$1/mnt/debian.raw" $size
umount "\$1/mnt/root"
# Kernel and initial RAM disk unpacked, because unpacking is what an emulated processor is slowest
# at: QEMU starts the ELF kernel by its PVH entry, 5 processor seconds earlier. Kept as it is where
# the kernel is not packed by xz.
cat "\$1"/boot/vmlinuz-* >"\$1/mnt/vmlinuz"
offset=\$(LC_ALL=C grep -m1 -aboP '\\xfd7zXZ\\x00' "\$1/mnt/vmlinuz" | head -n1 | cut -d: -f1)
[ -z "\$offset" ] || tail -c +\$((offset + 1)) "\$1/mnt/vmlinuz" | xz -dcq >"\$1/mnt/vmlinux" || true
[ "\$(head -c4 "\$1/mnt/vmlinux" | tail -c3)" != ELF ] || mv "\$1/mnt/vmlinux" "\$1/mnt/vmlinuz"
zcat "\$1"/boot/initrd.img-* >"\$1/mnt/initrd.img"
HOOK
)

work=$(mktemp -d "$out/build.XXXXXX")
trap 'rm -rf "$work"' EXIT
mirrors >"$work/sources.list"
mapfile -t apt_opts < <(apt_options)
apt_flags=()
for o in "${apt_opts[@]}"; do apt_flags+=(--aptopt="$o"); done

# --skip=cleanup: the tree is thrown away. (Beware of removing the build's own apt configuration in
# the guest's /tmp: apt would then work on the host.)
# C.UTF-8, so that PostgreSQL's cluster is UTF-8 and no locale has to be generated.
env LANG=C.UTF-8 LC_ALL=C.UTF-8 mmdebstrap --variant=minbase --format=null --skip=cleanup \
    --include="$(IFS=,; echo "${packages[*]}")" "${dpkg_options[@]}" "${apt_flags[@]}" \
    --essential-hook="$prepare" --customize-hook="$configure" --customize-hook="$image" \
    --customize-hook="download /mnt/debian.raw '$work/debian.raw'" \
    --customize-hook="download /mnt/vmlinuz '$work/vmlinuz'" \
    --customize-hook="download /mnt/initrd.img '$work/initrd.img'" \
    --customize-hook='umount "$1/mnt"' \
    "$suite" /dev/null "$work/sources.list" >"$out/build.log" 2>&1 9>&- || {
    tail -n 30 "$out/build.log" >&2
    echo "$0: the guest could not be built; the whole log is $out/build.log" >&2
    exit 1
}

cp --sparse=always "$work/debian.raw" "$out/debian.raw.new"
mv "$out/debian.raw.new" "$out/debian.raw"
mv "$work/vmlinuz" "$work/initrd.img" "$out/"
echo 'root=/dev/vda rootfstype=ext4 rootflags=noatime rw console=ttyS0 quiet loglevel=3 mitigations=off apparmor=0 audit=0 random.trust_cpu=on no_timer_check 8250.nr_uarts=1 systemd.gpt_auto=0' \
    >"$out/cmdline"
# Last, so that a build that was killed is built again.
echo "$stamp" >"$out/stamp"
