#!/bin/bash
# Runs kedge on an emulated machine that has Debian's kernel, busybox and nothing else, and
# pulls its plug again and again while it is written to: nothing that was acknowledged may be
# missing, and its pods must come back. What the machine's kernel had not written to the
# disk is lost each time; what the disk had been given is kept.
#
# usage: scripts/power-cuts.sh amd64|arm64 CYCLES   (see `make power-cuts`)
set -euo pipefail
cd "$(dirname "$0")/.."
arch=$1
cycles=$2
case $arch in
amd64) qemu=(qemu-system-x86_64 -M q35 -cpu max) package=qemu-system-x86 console=ttyS0 ;;
arm64) qemu=(qemu-system-aarch64 -M virt -cpu max,pauth-impdef=on) package=qemu-system-arm console=ttyAMA0 ;;
*) echo "there is no emulated machine for $arch: amd64 or arm64" >&2 && exit 2 ;;
esac
kedge=$PWD/bin/kedge # of this machine
guest=$kedge
[ "$arch" = "$(dpkg --print-architecture)" ] || guest=$kedge-$arch
dir=$PWD/build/machine/$arch
port=17443
mkdir -p "$dir"

as_root() { if [ "$(id -u)" = 0 ]; then "$@"; else sudo "$@"; fi; }

install_programs() {
	local missing=()
	command -v "${qemu[0]}" >/dev/null || missing+=("$package" ipxe-qemu)
	command -v cpio >/dev/null || missing+=(cpio)
	command -v depmod >/dev/null || missing+=(kmod)
	command -v mkfs.ext4 >/dev/null || missing+=(e2fsprogs)
	[ "$arch" = "$(dpkg --print-architecture)" ] || as_root dpkg --add-architecture "$arch"
	as_root apt-get update -qq
	[ ${#missing[@]} = 0 ] || as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}" >/dev/null
}

# make_disk makes the machine's kernel, its first file system and its disk.
make_disk() {
	local root=$dir/root init=$dir/init debs=$dir/debs version m n=0
	rm -rf "$root" "$init" "$debs" "$dir/disk.img"
	mkdir -p "$root"/{dev,proc,sys,run,tmp,etc/kedge,sbin,root,var/log,usr/bin,var/lib/kedge/images} "$init"/{bin,mod,dev,proc,sys,new} "$debs"
	version=$(apt-cache depends "linux-image-$arch:$arch" | grep -o 'linux-image-[0-9][^: ]*' | head -1)
	(cd "$debs" && apt-get download -qq "$version:$arch" "busybox-static:$arch" 2>/dev/null)
	for m in "$debs"/*.deb; do dpkg-deb -x "$m" "$root"; done
	mv "$root"/boot/vmlinuz-* "$dir/kernel"
	rm -rf "$root/boot"
	version=$(ls "$root/lib/modules")
	rm -rf "$root/lib/modules/$version/kernel/"{sound,drivers/{gpu,media,infiniband,staging,usb,scsi,iio,hid}}
	depmod -b "$root" "$version"
	for m in virtio_pci virtio_blk ext4 virtio_net; do modprobe -S "$version" -d "$root" --show-depends "$m"; done |
		grep -o '/.*\.ko' | awk '!seen[$0]++' | while read -r m; do
		n=$((n + 1))
		cp "$m" "$init/mod/$(printf %02d $n)-$(basename "$m")"
	done
	cp "$root/bin/busybox" "$init/bin/"
	cat >"$init/init" <<-'EOF'
		#!/bin/busybox sh
		/bin/busybox --install -s /bin
		mount -t proc proc /proc
		mount -t sysfs sys /sys
		mount -t devtmpfs dev /dev
		for m in /mod/*.ko; do insmod $m; done
		until [ -b /dev/vda ]; do sleep 0.1; done
		mount -t ext4 /dev/vda /new
		umount /proc /sys
		mount -o move /dev /new/dev
		exec switch_root /new /sbin/init
	EOF
	cat >"$root/sbin/init" <<-'EOF'
		#!/bin/busybox sh
		/bin/busybox --install -s /bin 2>/dev/null
		export PATH=/bin:/sbin:/usr/bin
		mount -t proc proc /proc
		mount -t sysfs sys /sys
		mount -t tmpfs run /run
		mount -t tmpfs tmp /tmp
		mount -t cgroup2 cgroup /sys/fs/cgroup
		hostname machine
		ip link set lo up
		ip link set eth0 up
		ip addr add 10.0.2.15/24 dev eth0
		ip route add default via 10.0.2.2
		echo "booted: $(uname -srm)"
		while :; do
			kedge server --node-name machine --tls-san 127.0.0.1 &
			pid=$!
			until [ -e /etc/kedge/kedge.yaml ]; do sleep 1; done
			echo "kubeconfig: $(base64 /etc/kedge/kedge.yaml | tr -d '\n')"
			wait $pid
		done
	EOF
	chmod +x "$init/init" "$root/sbin/init"
	ln -s ../bin/busybox "$root/sbin/modprobe" # for modules that the kernel asks for
	echo '127.0.0.1 localhost' >"$root/etc/hosts"
	echo 'root:x:0:0:root:/root:/bin/sh' >"$root/etc/passwd"
	echo 'nameserver 10.0.2.3' >"$root/etc/resolv.conf"
	cp "$guest" "$root/usr/bin/kedge"
	CGO_ENABLED=0 GOARCH=$arch go build -ldflags '-s -w' -o "$dir/probe" ./scripts/e2e/probe
	go run ./scripts/demo -arch "$arch" "$dir/probe" "$root/var/lib/kedge/images/hello.tar"
	(cd "$init" && find . | cpio -o -H newc 2>/dev/null | gzip -1) >"$dir/initrd"
	truncate -s 3G "$dir/disk.img"
	mkfs.ext4 -q -F -d "$root" "$dir/disk.img"
}

machine="" # its process
writers=()

power_on() {
	"${qemu[@]}" -smp 2 -m 2048 -accel tcg,thread=multi -display none -monitor none -no-reboot \
		-kernel "$dir/kernel" -initrd "$dir/initrd" -append "console=$console quiet panic=-1" \
		-drive "file=$dir/disk.img,format=raw,if=none,id=disk,cache=writethrough" -device virtio-blk-pci,drive=disk \
		-netdev "user,id=net,hostfwd=tcp:127.0.0.1:$port-10.0.2.15:6443" -device virtio-net-pci,netdev=net \
		-serial "file:$dir/console" </dev/null >"$dir/qemu.log" 2>&1 &
	machine=$!
}

pull_plug() {
	kill -KILL "$machine" && wait "$machine" 2>/dev/null || true
	machine=""
}

clean_up() {
	[ -z "$machine" ] || pull_plug
	[ ${#writers[@]} = 0 ] || kill "${writers[@]}" 2>/dev/null || true
	rm -rf "$dir/root" "$dir/init" "$dir/debs" "$dir/disk.img"
}
trap clean_up EXIT

kubectl() { "$kedge" kubectl --kubeconfig "$dir/kubeconfig" --request-timeout=60s "$@"; }

# until_true tries a command once a second for up to five minutes: the machine is slow.
until_true() {
	local n
	for n in $(seq 300); do
		if "$@" >/dev/null 2>&1; then return; fi
		kill -0 "$machine" 2>/dev/null || { tail -20 "$dir/console" "$dir/qemu.log" && exit 1; }
		sleep 1
	done
	echo "not within five minutes: $*" >&2
	tail -20 "$dir/console" >&2
	exit 1
}

fetch_kubeconfig() {
	sed -n 's/^kubeconfig: //p' "$dir/console" | tr -d '\r' | tail -1 | base64 -d 2>/dev/null | sed "s#server: .*#server: https://127.0.0.1:$port#" >"$dir/kubeconfig"
	[ -s "$dir/kubeconfig" ] && kubectl get --raw /readyz
}

answers() { [ "$(kubectl exec deployment/hello -- /hello get http://hello:8088/)" = "Hello from kedge!" ]; }

# write makes objects until its file is gone, and notes each that was acknowledged.
write() {
	local n=0
	while [ -e "$dir/writing" ]; do
		n=$((n + 1))
		if kubectl create configmap "$1-$n" --from-literal=n=$n >/dev/null 2>&1; then echo "configmap/$1-$n" >>"$dir/acked"; fi
	done
}

install_programs
make_disk
: >"$dir/acked"
power_on
until_true fetch_kubeconfig
grep -a '^booted:' "$dir/console"
until_true kubectl get node machine
kubectl get nodes -o wide
kubectl apply -f scripts/demo/hello.yaml
until_true answers
echo "the application answers"
for cycle in $(seq "$cycles"); do
	: >"$dir/writing"
	write "a$cycle" & writers=($!)
	write "b$cycle" & writers+=($!)
	sleep $((5 + RANDOM % 15))
	pull_plug
	rm "$dir/writing"
	wait "${writers[@]}"
	writers=()
	power_on
	if [ $((cycle % 2)) = 0 ]; then
		sleep $((5 + RANDOM % 20)) # while it starts
		pull_plug
		power_on
	fi
	until_true kubectl get --raw /readyz
	kubectl get configmaps -o name | sort >"$dir/there"
	lost=$(sort "$dir/acked" | comm -13 "$dir/there" -)
	if [ -n "$lost" ]; then
		echo "power cut $cycle: acknowledged and lost: $lost" >&2
		exit 1
	fi
	until_true answers
	echo "power cut $cycle: none of $(wc -l <"$dir/acked") acknowledged writes is lost, and the application answers"
done
