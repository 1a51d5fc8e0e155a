// Package release is the list of a release: which files belong to it, with the hash of each, and the signature that shows
// that the list is kedge's. [Verify] checks a list, [List.Check] a file, and [VerifyFolder] a folder with files of a
// release.
//
// A release is a folder with the files of one version:
//
//	kedge-linux-ARCH     the executable, for each architecture
//	install.sh           fetches, verifies, and runs "kedge install"
//	sbom.cdx.json        the modules in the executables (CycloneDX)
//	LICENCES.md          the licences of these modules
//	VERSION              the version, so that no list can be passed off as the list of another version
//	SHA256SUMS           the hashes of all of them, in the format of sha256sum: the list
//	SHA256SUMS.minisig   the signature of the list, in the format of minisign
//
// The format, the keys and the threats are described in docs/decisions/releases.md. The package fetches nothing, installs
// nothing, and does not sign: scripts/release makes releases. It links no component; package command, the rooms of
// appliance and scripts may import it.
package release
