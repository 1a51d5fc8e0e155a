#!/bin/bash
# Runs end-to-end tests on an emulated machine with Debian, where systemd manages the cgroups
# (version 2) and kedge is a systemd service. Most machines are like that, but the machine
# that runs the tests may differ. TestBesideDocker and TestUninstallLeavesNothing find a machine on which kedge
# never ran, the first one with Debian's Docker.
#
# usage: scripts/systemd-machine.sh REGEXP   (see `make systemd-machine`)
#
# Needs root and the executable (`make build build-e2e`). Emulation is slow: five to ten minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
tests=$1
dir=$PWD/build/machine/systemd
root=$dir/root
limit=1800 # seconds for the machine, from power-on to power-off

missing=()
command -v debootstrap >/dev/null || missing+=(debootstrap)
command -v qemu-system-x86_64 >/dev/null || missing+=(qemu-system-x86 ipxe-qemu)
if [ ${#missing[@]} != 0 ]; then
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
fi

machine=""
# shellcheck disable=SC2317 # it is called by trap
clean_up() {
	[ -z "$machine" ] || kill -KILL "$machine" 2>/dev/null || true
	rm -rf "$root" "$dir/disk.img"
}
trap clean_up EXIT
mkdir -p "$dir"
rm -rf "$root" "$dir/disk.img"

# The distribution of this machine, from the package sources of this machine.
# shellcheck disable=SC1091
. /etc/os-release
# shellcheck disable=SC2016 # apt-get replaces it
source=$(apt-get indextargets --format '$(SITE)' "Created-By: Packages" "Codename: $VERSION_CODENAME" | sort -u | grep -v security | head -1)
# named reports whether a test of that name is to run.
named() { grep -qE -- "$tests" <<<"$1"; }
packages=systemd,systemd-sysv,dbus,linux-image-cloud-amd64,initramfs-tools,busybox-static,e2fsprogs,mount
service=1
if named TestBesideDocker; then
	packages+=,nftables,apparmor,docker.io
	service=""
fi
if named TestUninstallLeavesNothing; then
	packages+=,nftables
	service=""
fi
echo "installing $PRETTY_NAME"
debootstrap --variant=minbase --include="$packages" \
	"$VERSION_CODENAME" "$root" "$source" >"$dir/debootstrap.log" 2>&1 || { tail -5 "$dir/debootstrap.log" >&2 && exit 1; }

# The source tree that the tests expect, and the test program of each package with a matching test.
mkdir -p "$root/kedge/bin" "$root/kedge/build/e2e"
cp bin/kedge "$root/kedge/bin/"
cp build/e2e/{agnhost,probe,badversion} "$root/kedge/build/e2e/"
tested=()
for main in scripts/e2e/*/main_test.go; do
	package=${main%/*}
	sed -nE 's/^func (Test[[:alnum:]]+)\(.*/\1/p' "$package"/*_test.go | grep -E -- "$tests" >/dev/null || continue
	mkdir -p "$root/kedge/$package"
	[ ! -d "$package/testdata" ] || cp -r "$package/testdata" "$root/kedge/$package/"
	go test -c -o "$root/kedge/$package/e2e.test" "./$package"
	tested+=("$package")
done
[ ${#tested[@]} != 0 ] || { echo "no end-to-end test is called $tests" >&2 && exit 1; }
echo machine >"$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 machine\n' >"$root/etc/hosts"
printf '/dev/vda / ext4 defaults 0 1\n' >"$root/etc/fstab"
printf '[Match]\nName=e*\n[Network]\nDHCP=yes\n' >"$root/etc/systemd/network/all.network"
if named TestBesideDocker; then
	# The exact drop-in of docs/install.md.
	awk '/^```ini/ { inside = 1; next } /^```/ { inside = 0 } inside' docs/install.md >"$root/kedge/docker.conf"
	grep -q DOCKER-USER "$root/kedge/docker.conf" || { echo "docs/install.md contains no drop-in for Docker" >&2 && exit 1; }
fi
if [ -n "$service" ]; then
	mkdir -p "$root/var/lib/kedge/images"
	ln -s /kedge/bin/kedge "$root/usr/local/bin/kedge"
	# The exact service unit of the README.md.
	awk '/^```ini/ { inside = 1; next } /^```/ { inside = 0 } inside' README.md >"$root/etc/systemd/system/kedge.service"
	grep -q ExecStart "$root/etc/systemd/system/kedge.service" || { echo "README.md contains no systemd service" >&2 && exit 1; }
	cat >"$root/kedge/service" <<-'EOF2'
		systemctl start kedge || { journalctl -u kedge --no-pager | tail -30; result "kedge.service does not start"; }
		echo "kedge.service: $(systemctl is-active kedge), $(kedge kubectl get nodes --no-headers)"
		systemctl restart kedge || result "kedge.service does not restart"
		systemctl stop kedge || result "kedge.service does not stop"
		kedge killall || result "killall fails"
		[ -z "$(ls -d /sys/fs/cgroup/kedge* 2>/dev/null)" ] || result "a control group is left"
	EOF2
fi
cat >"$root/kedge/run" <<-EOF2
	#!/bin/bash
	set -u
	result() { echo "RESULT \$1"; systemctl poweroff; exit; }
	echo "booted: \$(uname -sr), control groups \$(stat -fc %T /sys/fs/cgroup), \$(systemctl --version | head -1)"
	[ ! -e /kedge/service ] || . /kedge/service
	failed=0
	for package in ${tested[*]}; do
		cd /kedge/\$package
		KEDGE_E2E_SLOW=8 ./e2e.test -test.v -test.timeout 28m -test.run '$tests' || failed=\$?
	done
	result \$failed
EOF2
chmod +x "$root/kedge/run"
cat >"$root/etc/systemd/system/tests.service" <<-'EOF2'
	[Unit]
	Wants=network-online.target
	After=network-online.target
	[Service]
	Type=oneshot
	Environment=HOME=/root PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
	ExecStart=/kedge/run
	StandardOutput=tty
	StandardError=tty
	TTYPath=/dev/ttyS1
	[Install]
	WantedBy=multi-user.target
EOF2
for unit in systemd-networkd systemd-networkd-wait-online tests; do
	chroot "$root" systemctl enable -q "$unit"
done
cp "$root"/boot/vmlinuz-* "$dir/kernel"
cp "$root"/boot/initrd.img-* "$dir/initrd"
truncate -s 4G "$dir/disk.img"
mkfs.ext4 -q -F -d "$root" "$dir/disk.img"

: >"$dir/output"
qemu-system-x86_64 -M q35 -cpu max -smp 2 -m 3072 -accel tcg,thread=multi -display none -monitor none -no-reboot \
	-kernel "$dir/kernel" -initrd "$dir/initrd" -append "root=/dev/vda rw console=ttyS0 quiet" \
	-drive "file=$dir/disk.img,format=raw,if=none,id=disk" -device virtio-blk-pci,drive=disk \
	-netdev user,id=net -device virtio-net-pci,netdev=net \
	-serial "file:$dir/console" -serial "file:$dir/output" </dev/null >"$dir/qemu.log" 2>&1 &
machine=$!
tail -f --pid="$machine" "$dir/output" &
for _ in $(seq "$limit"); do
	kill -0 "$machine" 2>/dev/null || break
	sleep 1
done
if grep -aq '^RESULT 0' "$dir/output"; then
	exit 0
fi
echo "the tests on the machine with systemd fail; its console is in $dir/console" >&2
exit 1
