#!/bin/bash
# Runs the life of an installation of kedge with OpenRC: in a Debian with OpenRC below a folder, with namespaces of its own for
# mounts and processes, and the network and the kernel of this machine. OpenRC has not booted that Debian; its supervise-daemon
# and rc-service are the real ones.
#
# usage: scripts/openrc-machine.sh                 (see `make openrc-machine`)
#        scripts/openrc-machine.sh emulated        the same on an emulated machine that OpenRC boots, and a boot with kedge and
#                                                  upgrades to a good and to a faulty version; ten to twenty minutes
#        scripts/openrc-machine.sh root PACKAGES   only makes the folder, with more packages, and prints its path
#        scripts/openrc-machine.sh inside          runs its program kedge/run, in namespaces of the caller
#
# Needs root and the executable (`make build`). Takes about two minutes.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=$PWD/build/machine/openrc
root=$dir/root

if [ "${1:-}" = inside ]; then
	# What is mounted in here is gone with the namespace. Control groups: those of this machine, and nothing that services of
	# OpenRC create beside them.
	mount --make-rprivate /
	mount --bind "$root" "$root"
	mount --rbind /dev "$root/dev"
	mount --rbind /sys "$root/sys"
	mount -t proc proc "$root/proc"
	mount -t tmpfs run "$root/run"
	if [ "$(stat -fc %T /sys/fs/cgroup)" = tmpfs ]; then
		mount -t tmpfs cgroups "$root/sys/fs/cgroup"
		for hierarchy in /sys/fs/cgroup/*/; do
			mkdir "$root$hierarchy"
			mount --bind "$hierarchy" "$root$hierarchy"
		done
	fi
	for d in exclusive starting started daemons options inactive wasinactive failed hotplugged scheduled stopping crashed tmp; do
		mkdir -p "$root/run/openrc/$d"
	done
	touch "$root/run/openrc/softlevel"
	exec chroot "$root" /kedge/run
fi

command -v debootstrap >/dev/null || {
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends debootstrap >/dev/null
}
packages=openrc,procps
mode=${1:-below}
machine=""
# shellcheck disable=SC2317 # it is called by trap
clean_up() {
	[ -z "$machine" ] || kill -KILL "$machine" 2>/dev/null || true
	rm -rf --one-file-system "$root" "$dir/disk.img"
}
case $mode in
root) packages+=,$2 ;;
emulated)
	command -v qemu-system-x86_64 >/dev/null || {
		apt-get update -qq
		DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends qemu-system-x86 ipxe-qemu >/dev/null
	}
	packages+=,linux-image-cloud-amd64,initramfs-tools,busybox-static,e2fsprogs,mount,iproute2,udev
	trap clean_up EXIT
	;;
*) trap clean_up EXIT ;;
esac
mkdir -p "$dir"
rm -rf --one-file-system "$root"
# shellcheck disable=SC1091
. /etc/os-release
# shellcheck disable=SC2016 # apt-get replaces it
source=$(apt-get indextargets --format '$(SITE)' "Created-By: Packages" "Codename: $VERSION_CODENAME" | sort -u | grep -v security | head -1)
echo "installing $PRETTY_NAME with OpenRC"
debootstrap --variant=minbase --include="$packages" "$VERSION_CODENAME" "$root" "$source" >"$dir/debootstrap.log" 2>&1 || { tail -5 "$dir/debootstrap.log" >&2 && exit 1; }
if [ "$mode" = emulated ]; then
	# debootstrap would take sysv-rc for them, with which OpenRC conflicts.
	(cd "$root/tmp" && apt-get download -qq sysvinit-core initscripts 2>/dev/null)
	chroot "$root" sh -c 'DEBIAN_FRONTEND=noninteractive dpkg -i /tmp/*.deb' >>"$dir/debootstrap.log" 2>&1 || { tail -5 "$dir/debootstrap.log" >&2 && exit 1; }
fi
mkdir -p "$root/kedge"
cp bin/kedge "$root/kedge/kedge"
printf '127.0.0.1 localhost\n' >"$root/etc/hosts"
if [ "$mode" != emulated ]; then
	# A service of a booted machine that kedge's uses, and none that would mount or unmount what is this machine's.
	rm -f "$root"/etc/init.d/{cgroups,cgroupfs-mount} "$root"/etc/runlevels/*/*
	printf '#!/sbin/openrc-run\ndepend() { provide net; }\nstart() { :; }\n' >"$root/etc/init.d/test-net"
	chmod +x "$root/etc/init.d/test-net"
fi
if [ "$mode" = root ]; then
	echo "$root"
	exit
fi

cat >"$root/kedge/run" <<-'EOF2'
	#!/bin/bash
	set -u
	export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
	fail() {
		echo "FAIL: $*" >&2
		tail -20 /var/log/kedge.log >&2
		/kedge/kedge uninstall --purge >/dev/null 2>&1
		exit 1
	}
	process() { cat /run/kedge/kedge.lock; }
	# expect OUTPUT COMMAND...: the command succeeds and prints the output, among others.
	expect() {
		local want=$1 out
		shift
		out=$("$@" 2>&1) || fail "$*: $out"
		[[ $out == *"$want"* ]] || fail "$*: no \"$want\" in: $out"
		echo "ok: $*"
	}
	stopped() {
		for _ in $(seq 100); do
			rc-service kedge status >/dev/null 2>&1
			[ $? = 3 ] && return
			sleep 0.2
		done
		fail "the service is not stopped: $(rc-service kedge status)"
	}
	export HTTPS_PROXY=http://192.0.2.1:3128
	expect "is ready:" /kedge/kedge install server --node-name=openrc-machine --https-listen-port=46643 --kubelet-port=46644 --peer-port=46645 --wait=5m
	expect started rc-service kedge status
	[ -L /etc/runlevels/default/kedge ] || fail "the service is not enabled"
	[ "$(readlink /proc/$(process)/fd/2)" = /var/log/kedge.log ] || fail "the log is $(readlink /proc/$(process)/fd/2)"
	tr '\0' '\n' </proc/$(process)/environ | grep -qx "HTTPS_PROXY=http://192.0.2.1:3128" || fail "the service lacks the proxy"
	first=$(process)
	expect "is ready:" /kedge/kedge install server
	[ "$(process)" = "$first" ] || fail "an installation without changes restarts kedge"
	echo "# of the user" >>/etc/conf.d/kedge
	expect "restart the service" /kedge/kedge install server --write-kubeconfig-mode=640
	[ "$(process)" != "$first" ] || fail "a changed setting does not restart kedge"
	grep -q "of the user" /etc/conf.d/kedge || fail "/etc/conf.d/kedge was replaced"

	echo "kedge is killed"
	first=$(process)
	kill -KILL "$first"
	for _ in $(seq 300); do
		kedge status >/dev/null 2>&1 && break
		sleep 0.2
	done
	kedge status >/dev/null || fail "kedge was not started again"

	echo "kedge has a mistake in its configuration, when it is started again and when its service is started"
	mkdir /etc/kedge/config.yaml.d
	echo "flannel-backend: vxlna" >/etc/kedge/config.yaml.d/mistake.yaml
	: >/var/log/kedge.log
	kill -KILL "$(process)"
	stopped
	rc-service kedge start >/dev/null 2>&1
	stopped
	[ "$(grep -c vxlna /var/log/kedge.log)" = 2 ] || fail "kedge was started $(grep -c vxlna /var/log/kedge.log) times, want 2"
	rm -r /etc/kedge/config.yaml.d
	expect "is ready:" /kedge/kedge install server

	expect "kedge is removed" kedge uninstall
	[ ! -e /etc/init.d/kedge ] && [ ! -e /usr/local/bin/kedge ] && [ ! -e /run/kedge ] || fail "something is left: $(ls -d /etc/init.d/kedge /usr/local/bin/kedge /run/kedge 2>/dev/null)"
	[ -f /etc/conf.d/kedge ] || fail "a file that the user has changed was removed"
	[ -d /var/lib/kedge/server/tls ] || fail "the data was removed"
	expect "is ready:" /kedge/kedge install server
	expect "kedge is removed" kedge uninstall --purge
	[ ! -e /etc/kedge ] && [ ! -e /var/lib/kedge ] && [ ! -e /run/kedge ] || fail "something is left: $(ls -d /etc/kedge /var/lib/kedge /run/kedge 2>/dev/null)"
	ls /var/log/kedge.log* 2>/dev/null && fail "the log is left"

	echo "kedge is installed from a bundle, and a newer bundle restarts it"
	cd /kedge || exit
	# image NAME: an archive as "docker save" writes it, with one file.
	image() {
		mkdir -p image
		tar cf image/layer.tar -C /etc hosts
		printf '{"architecture":"%s","os":"linux","config":{"Labels":{"name":"%s"}},"rootfs":{"type":"layers","diff_ids":["sha256:%s"]}}' \
			"$(dpkg --print-architecture)" "$1" "$(sha256sum <image/layer.tar | cut -d' ' -f1)" >image/config.json
		printf '[{"Config":"config.json","RepoTags":["example.org/%s:1"],"Layers":["layer.tar"]}]' "$1" >image/manifest.json
		tar cf "$1.tar" -C image layer.tar config.json manifest.json
		printf 'apiVersion: v1\nkind: ConfigMap\nmetadata: {name: %s, namespace: default}\n' "$1" >"$1.yaml"
	}
	image one
	image two
	printf 'images: [./one.tar]\nmanifests: [one.yaml]\nconfig: {node-name: openrc-machine, https-listen-port: 46643, kubelet-port: 46644, peer-port: 46645}\n' >bundle.yaml
	expect "with 1 image, 1 manifest" ./kedge bundle create -o site.run
	sed -i 's/one.tar/one.tar, .\/two.tar/; s/one.yaml/one.yaml, two.yaml/' bundle.yaml
	expect "with 2 images, 2 manifests" ./kedge bundle create -o newer.run
	expect "wrote delta.run" ./kedge bundle diff site.run newer.run -o delta.run
	expect "is ready:" ./site.run install server --wait=5m
	expect one kedge kubectl get configmap one
	expect pinned kedge images ls
	first=$(process)
	expect "is ready:" ./site.run install server
	[ "$(process)" = "$first" ] || fail "the same bundle restarts kedge"
	head -c -70 newer.run >cut.run
	chmod +x cut.run
	out=$(./cut.run install server 2>&1) && fail "a bundle that is cut off is installed: $out"
	[ "$(process)" = "$first" ] || fail "a bundle that is cut off restarts kedge"
	expect "restart the service" ./delta.run install server
	[ "$(process)" != "$first" ] || fail "a newer bundle does not restart kedge"
	expect two kedge kubectl get configmap two
	for _ in $(seq 100); do
		kedge images ls | grep -q example.org/two:1 && break
		sleep 0.2
	done
	expect example.org/two:1 kedge images ls
	expect "kedge is removed" kedge uninstall --purge
	[ ! -e /etc/kedge ] && [ ! -e /var/lib/kedge ] && [ ! -e /run/kedge ] || fail "something is left: $(ls -d /etc/kedge /var/lib/kedge /run/kedge 2>/dev/null)"
	exit 0
EOF2
chmod +x "$root/kedge/run"
if [ "$mode" != emulated ]; then
	unshare --mount --pid --fork --uts --kill-child "$0" inside
	exit
fi

# What the emulated machine does after each of its boots.
cp build/e2e/badversion "$root/kedge/"
cat >"$root/kedge/boot" <<-'EOF2'
	#!/bin/bash
	# The first boot runs the life of an installation, installs kedge again and boots anew. The second one finds it running.
	set -u
	export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
	end() { echo "RESULT $1"; poweroff; exit; }
	await() {
		for _ in $(seq 600); do
			"$@" >/dev/null 2>&1 && return
			sleep 1
		done
		tail -30 /var/log/kedge.log
		end "$*"
	}
	if [ ! -e /kedge/booted ]; then
		echo "booted: $(uname -sr), PID 1 is $(readlink /proc/1/exe), OpenRC $(openrc --version), control groups $(stat -fc %T /sys/fs/cgroup)"
		/kedge/run || end "the life of an installation"
		/kedge/kedge install server --node-name=openrc-machine --wait=10m || end "kedge install"
		kedge kubectl create configmap before
		touch /kedge/booted
		sync
		reboot
		exit
	fi
	await kedge kubectl get --raw /readyz
	await rc-service kedge status
	kedge kubectl get configmap before || end "the data is gone after the boot"
	echo "ok: kedge runs after the boot"
	# Another hash: padding of ELF's header.
	cp /kedge/kedge /kedge/newer
	printf 'another' | dd of=/kedge/newer bs=1 seek=9 conv=notrunc status=none
	kedge upgrade --file=/kedge/newer --observe=5s --wait=10m || end "the upgrade to a good version"
	cmp /usr/local/bin/kedge /kedge/newer || end "another executable is installed"
	{ cat /kedge/badversion; printf '\n{"real":"/kedge/newer","version":"v9.9.9-panic","fault":"panic","dataDir":"/var/lib/kedge"}'; } >/kedge/panics
	chmod +x /kedge/panics
	out=$(kedge upgrade --file=/kedge/panics --observe=5s --wait=10m 2>&1) && end "the upgrade to a version that panics succeeds: $out"
	echo "$out"
	[[ $out == *"did not become healthy in 3 starts"* ]] || end "the upgrade to a version that panics"
	await kedge kubectl get --raw /readyz
	cmp /usr/local/bin/kedge /kedge/newer || end "another executable is installed after the way back"
	kedge kubectl get configmap before || end "the data is gone after the upgrades"
	kedge uninstall --purge || end "kedge uninstall"
	end 0
EOF2
chmod +x "$root/kedge/boot"
echo machine >"$root/etc/hostname"
printf '/dev/vda / ext4 defaults 0 1\n' >"$root/etc/fstab"
# The network of QEMU, without a DHCP client.
cat >"$root/etc/init.d/test-net" <<-'EOF2'
	#!/sbin/openrc-run
	depend() { provide net; }
	start() {
		ip link set lo up
		for link in /sys/class/net/e*; do
			ip link set "${link##*/}" up
			ip address add 10.0.2.15/24 dev "${link##*/}"
			ip route add default via 10.0.2.2
		done
	}
EOF2
chmod +x "$root/etc/init.d/test-net"
ln -s /etc/init.d/test-net "$root/etc/runlevels/default/test-net"
# Init starts it after the services of the runlevel.
echo 'te:2345:once:/kedge/boot </dev/null >/dev/ttyS1 2>&1' >>"$root/etc/inittab"
cp "$root"/boot/vmlinuz-* "$dir/kernel"
cp "$root"/boot/initrd.img-* "$dir/initrd"
truncate -s 4G "$dir/disk.img"
mkfs.ext4 -q -F -d "$root" "$dir/disk.img"
: >"$dir/output"
qemu-system-x86_64 -M q35 -cpu max -smp 2 -m 2048 -accel tcg,thread=multi -display none -monitor none \
	-kernel "$dir/kernel" -initrd "$dir/initrd" -append "root=/dev/vda rw console=ttyS0 quiet" \
	-drive "file=$dir/disk.img,format=raw,if=none,id=disk" -device virtio-blk-pci,drive=disk \
	-netdev user,id=net -device virtio-net-pci,netdev=net \
	-serial "file:$dir/console" -serial "file:$dir/output" </dev/null >"$dir/qemu.log" 2>&1 &
machine=$!
tail -f --pid="$machine" "$dir/output" &
for _ in $(seq 2400); do # seconds, from power-on to power-off
	kill -0 "$machine" 2>/dev/null || break
	sleep 1
done
grep -aq '^RESULT 0' "$dir/output" || { echo "the life of an installation on the machine with OpenRC fails; its console is in $dir/console" >&2 && exit 1; }
