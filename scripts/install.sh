#!/bin/sh
# Installs kedge:  curl -sfL https://get.kedge.io/install.sh | sh -s - server --tls-san kedge.example.com
#
# The arguments are those of "kedge install": server or agent, and settings; without server or agent it is a server, or an agent
# if KEDGE_SERVER is set. The script downloads and verifies the executable and runs "kedge install", which does the rest.
# KEDGE_* variables that are settings, such as KEDGE_TOKEN, are passed on in the environment: other users do not see them there.
#
#   KEDGE_CHANNEL  the channel of releases: stable (default) or latest
#   KEDGE_VERSION  a version, such as v1.2.3, instead of that of the channel
#   KEDGE_URL      where the releases are
#   KEDGE_BIN      a FILE to install: nothing is downloaded. It is verified if a SHA256SUMS that lists it is beside it
{ # A script that is cut off in transit has no closing brace: the shell runs none of it.
set -eu

# The public key of kedge's releases, in minisign's format, as in appliance/release/keys.go. Without it only hashes are checked.
key=''

fail() {
	printf 'kedge: %s\n' "$*" >&2
	exit 1
}

have() { command -v "$1" >/dev/null 2>&1; }

# choose_command sets role, and first to 1 if the first argument is the role.
choose_command() {
	first=1
	case ${1:-} in
	server | agent) role=$1 ;;
	'' | -*)
		first=0 role=server
		[ -z "${KEDGE_SERVER:-}" ] || role=agent
		;;
	*) fail "\"$1\" cannot be installed: use server or agent, followed by settings" ;;
	esac
	[ "$role" = agent ] || return 0
	case " $* " in *' --token'* | *' -t'*) return 0 ;; esac
	[ -n "${KEDGE_TOKEN:-}${KEDGE_TOKEN_FILE:-}" ] || [ -e "${KEDGE_CONFIG:-/etc/kedge/config.yaml}" ] ||
		fail "an agent joins with a token: set KEDGE_TOKEN to what \"kedge token create\" prints on a server"
}

# find_name sets name, the name of the executable for this machine.
find_name() {
	[ "$(uname -s)" = Linux ] || fail "kedge runs on Linux, and this is $(uname -s)"
	case $(uname -m) in
	x86_64 | amd64) name=kedge-linux-amd64 ;;
	aarch64 | arm64) name=kedge-linux-arm64 ;;
	*) fail "there is no kedge for the architecture $(uname -m), only for x86_64 and aarch64" ;;
	esac
}

# make_folder sets dir, a temporary folder from which programs can run.
make_folder() {
	for parent in "${TMPDIR:-/var/tmp}" /var/tmp /tmp; do
		dir=$(umask 077 && mktemp -d "$parent/kedge.XXXXXX" 2>/dev/null) || continue
		if printf '#!/bin/sh\n' 2>/dev/null >"$dir/try" && chmod 700 "$dir/try" && "$dir/try" 2>/dev/null; then return 0; fi
		rm -rf "$dir"
	done
	dir=
	fail "no folder for temporary files can be written to and allows programs to run: set TMPDIR to one that does"
}

# find_downloader sets downloader to curl or wget, and checked to 1 if it checks the server's certificate.
find_downloader() {
	downloader=curl
	if ! have curl; then
		downloader=wget
		have wget || fail "curl or wget is needed to download kedge: install one of them, or set KEDGE_BIN to the file of the executable"
		case $(wget --help 2>&1) in *BusyBox*) checked=0 ;; esac
	fi
	case $base in https://?*) ;; *) fail "KEDGE_URL must begin with https://, and is $base" ;; esac
}

# get downloads URL $1 to the file $2.
get() {
	code=0
	case $downloader$checked in
	curl1) said=$(curl -fsSL --proto =https --connect-timeout 30 --speed-limit 1 --speed-time 60 --retry 3 -o "$2" "$1" 2>&1) || code=$? ;;
	wget1) said=$(wget -nv --max-redirect 5 -T 60 -t 3 -O "$2" "$1" 2>&1) || code=$? ;;
	wget0) said=$(wget -q -O "$2" "$1" 2>&1) || code=$? ;;
	esac
	[ "$code" != 0 ] || return 0
	said=$(printf '%s\n' "$said" | sed -n '$s/^ *//p')
	case $downloader$code in
	curl23 | wget3) said="$dir has no space left, or cannot be written to" ;;
	esac
	fail "$1 cannot be downloaded: ${said:-$downloader ends with code $code}"
}

# find_version sets version.
find_version() {
	version=${KEDGE_VERSION:-} channel=${KEDGE_CHANNEL:-stable}
	case $version$channel in *[!A-Za-z0-9.+_-]*) fail "KEDGE_VERSION and KEDGE_CHANNEL consist of letters, digits and .+_-" ;; esac
	if [ -z "$version" ]; then
		get "$base/channels/$channel" "$dir/channel"
		version=$(sed -n 1p "$dir/channel")
	fi
	case $version in '' | [.+-]* | *[!A-Za-z0-9.+_-]*) fail "$base/channels/$channel does not have the name of a version" ;; esac
	printf '%s\n' "$version" >"$dir/VERSION"
}

# check_hash compares the file $1 in the folder with the list.
check_hash() {
	have sha256sum || fail "the program sha256sum is needed to verify kedge: install coreutils or busybox"
	want=$(sed -n "s/^\([0-9a-f]\{64\}\) [ *]$1\$/\1/p" "$dir/SHA256SUMS")
	[ -n "$want" ] || fail "the release has no file $1"
	[ "$(sha256sum <"$dir/$1" | cut -c 1-64)" = "$want" ]
}

# openssl_can: an openssl of version 3 with the two algorithms of minisign's format.
openssl_can() {
	have openssl && openssl dgst -blake2b512 </dev/null >/dev/null 2>&1 && openssl pkeyutl -help 2>&1 | grep -q -e -rawin
}

openssl_verifies() {
	bytes=$(printf %s "$key" | openssl base64 -d -A | tail -c 32 | openssl base64 -A)
	printf -- '-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA%s\n-----END PUBLIC KEY-----\n' "$bytes" >"$dir/key.pem"
	sed -n 2p "$dir/SHA256SUMS.minisig" | openssl base64 -d -A | tail -c 64 >"$dir/signature"
	openssl dgst -blake2b512 -binary "$dir/SHA256SUMS" >"$dir/digest"
	openssl pkeyutl -verify -pubin -inkey "$dir/key.pem" -rawin -in "$dir/digest" -sigfile "$dir/signature"
}

# check_list checks the list in the folder, which comes from $1, before anything of it is used.
check_list() {
	if [ -z "$key" ]; then
		[ "$checked" = 1 ] || fail "the release is not signed, and busybox's wget does not check who sends it: install curl"
		printf 'kedge: this release is not signed: only its hashes are checked\n' >&2
	elif have minisign; then
		minisign -V -q -P "$key" -m "$dir/SHA256SUMS" >/dev/null 2>&1 || fail "the signature of the release is wrong: do not use it"
	elif openssl_can; then
		openssl_verifies >/dev/null 2>&1 || fail "the signature of the release is wrong: do not use it"
	elif [ "$checked" = 0 ]; then
		fail "busybox's wget does not check who sends the release: install curl, openssl 3 or minisign"
	else
		printf 'kedge: without openssl 3 or minisign the executable itself checks the signature of the release\n' >&2
	fi
	check_hash VERSION || fail "$1 is not release $version: its list of files is of another version"
}

# check_executable checks the executable, which comes from $1. The executable checks the signature in any case.
check_executable() {
	check_hash "$name" || fail "$1/$name is damaged: its hash is not that of the release; run the script again"
	chmod 700 "$dir/$name"
	[ -n "$key" ] || return 0
	said=$(XDG_CACHE_HOME="$dir/cache" "$dir/$name" verify "$dir" 2>&1 </dev/null) || fail "${said#kedge: }"
}

download() {
	find_name
	find_downloader
	find_version
	echo "Downloading kedge $version for ${name##*-}"
	get "$base/$version/SHA256SUMS" "$dir/SHA256SUMS"
	[ -z "$key" ] || get "$base/$version/SHA256SUMS.minisig" "$dir/SHA256SUMS.minisig"
	check_list "$base/$version"
	get "$base/$version/$name" "$dir/$name"
	check_executable "$base/$version"
}

# take_file copies KEDGE_BIN, and the list beside it, into the folder.
take_file() {
	[ -d "$KEDGE_BIN" ] || name=${KEDGE_BIN##*/}
	case $name in '' | [.-]* | *[!A-Za-z0-9.+_-]*) fail "KEDGE_BIN names a file whose name has only letters, digits and .+_-, and \"$KEDGE_BIN\" is none" ;; esac
	case $KEDGE_BIN in */*) from=${KEDGE_BIN%/*} ;; *) from=. ;; esac
	for file in "$name" SHA256SUMS SHA256SUMS.minisig VERSION; do
		[ "$file" = "$name" ] || [ -f "$from/$file" ] || continue
		said=$(cp "$from/$file" "$dir/$file" 2>&1) || fail "$KEDGE_BIN cannot be used: ${said#cp: }"
	done
	chmod 700 "$dir/$name"
	grep -qs " [ *]$name\$" "$dir/SHA256SUMS" || case $(XDG_CACHE_HOME="$dir/cache" "$dir/$name" version 2>/dev/null </dev/null) in
	'kedge '*) return 0 ;;
	*) fail "$KEDGE_BIN is damaged, or no kedge for this machine ($(uname -m)): copy it again" ;;
	esac
	if [ ! -e "$dir/VERSION" ] || { [ -n "$key" ] && [ ! -e "$dir/SHA256SUMS.minisig" ]; }; then
		fail "$from has SHA256SUMS, but not both SHA256SUMS.minisig and VERSION: copy all or none of them with the executable"
	fi
	version=$(sed -n 1p "$dir/VERSION")
	check_list "$from"
	check_executable "$from"
}

main() {
	base=${KEDGE_URL:-https://get.kedge.io} dir='' name='' checked=1
	base=${base%/}
	trap '[ -z "$dir" ] || rm -rf "$dir"' EXIT
	trap 'exit 1' HUP INT TERM
	choose_command "$@"
	[ "$(id -u)" = 0 ] || fail "only root can install kedge: run the script as root, for example with sudo"
	make_folder
	if [ -n "${KEDGE_BIN:-}" ]; then take_file; else download; fi
	[ "$first" = 0 ] || shift
	unset KEDGE_URL KEDGE_CHANNEL KEDGE_VERSION KEDGE_BIN
	# The executable unpacks itself into the cache, which goes with the folder.
	XDG_CACHE_HOME="$dir/cache" "$dir/$name" install "$role" "$@" </dev/null
}

main "$@"
exit
}
