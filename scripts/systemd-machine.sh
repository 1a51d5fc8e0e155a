#!/bin/bash
# Runs end-to-end tests on an emulated machine with Debian, where systemd owns the control
# groups (of version 2) and kedge is its service. Most machines are like that, and the
# machine that the tests usually run on may not be.
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
clean_up() {
	[ -z "$machine" ] || kill -KILL "$machine" 2>/dev/null || true
	rm -rf "$root" "$dir/disk.img"
}
trap clean_up EXIT
mkdir -p "$dir"
rm -rf "$root" "$dir/disk.img"

# The distribution of this machine, from where this machine gets it.
. /etc/os-release
source=$(apt-get indextargets --format '$(SITE)' "Created-By: Packages" "Codename: $VERSION_CODENAME" | sort -u | grep -v security | head -1)
echo "installing $PRETTY_NAME"
debootstrap --variant=minbase --include=systemd,systemd-sysv,dbus,linux-image-cloud-amd64,initramfs-tools,busybox-static,e2fsprogs,mount \
	"$VERSION_CODENAME" "$root" "$source" >"$dir/debootstrap.log" 2>&1 || { tail -5 "$dir/debootstrap.log" >&2 && exit 1; }

# The tree as the tests expect it, and the program of the tests.
mkdir -p "$root/kedge/bin" "$root/kedge/build/e2e" "$root/kedge/scripts/e2e"
cp bin/kedge "$root/kedge/bin/"
cp build/e2e/{agnhost,probe} "$root/kedge/build/e2e/"
cp -r scripts/e2e/testdata "$root/kedge/scripts/e2e/"
go test -c -o "$root/kedge/scripts/e2e/e2e.test" ./scripts/e2e
ln -s /kedge/bin/kedge "$root/usr/local/bin/kedge"

echo machine >"$root/etc/hostname"
printf '127.0.0.1 localhost\n127.0.1.1 machine\n' >"$root/etc/hosts"
printf '/dev/vda / ext4 defaults 0 1\n' >"$root/etc/fstab"
printf '[Match]\nName=e*\n[Network]\nDHCP=yes\n' >"$root/etc/systemd/network/all.network"
mkdir -p "$root/var/lib/kedge/images"
# The service of the README, to the letter.
awk '/^```ini/ { inside = 1; next } /^```/ { inside = 0 } inside' README.md >"$root/etc/systemd/system/kedge.service"
grep -q ExecStart "$root/etc/systemd/system/kedge.service" || { echo "README.md shows no service of systemd's" >&2 && exit 1; }
cat >"$root/kedge/run" <<-EOF2
	#!/bin/bash
	set -u
	result() { echo "RESULT \$1"; systemctl poweroff; exit; }
	echo "booted: \$(uname -sr), control groups \$(stat -fc %T /sys/fs/cgroup), \$(systemctl --version | head -1)"
	systemctl start kedge || { journalctl -u kedge --no-pager | tail -30; result "kedge.service does not start"; }
	echo "kedge.service: \$(systemctl is-active kedge), \$(kedge kubectl get nodes --no-headers)"
	systemctl restart kedge || result "kedge.service does not restart"
	systemctl stop kedge || result "kedge.service does not stop"
	kedge killall || result "killall fails"
	[ -z "\$(ls -d /sys/fs/cgroup/kedge* 2>/dev/null)" ] || result "a control group is left"
	cd /kedge/scripts/e2e
	KEDGE_E2E_SLOW=8 ./e2e.test -test.v -test.timeout 28m -test.run '$tests'
	result \$?
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
