// Package bundle is the file that installs kedge with everything that a machine without a network needs: the executable,
// images, manifests, charts and default settings.
//
// The file is the executable: the kernel and the launcher ignore what follows an ELF file. Its parts lie one after the
// other, without gaps, so that no byte is outside of a hash:
//
//	the executable; or a script (see head) and the executables of several architectures; or a script alone
//	the contents: blobs of images, manifests and charts, each once, by their SHA-256
//	the index, in JSON: offset, size and SHA-256 of everything before it
//	the signature of the index, in the format of minisign, or nothing
//	the trailer: 64 bytes with the place and the SHA-256 of index and signature
//
// [Open] reads the index and believes nothing of it that it has not checked; [File.Verify] reads everything. [Create]
// writes a bundle from a [Spec], and [Diff] one that has only what another one lacks. [File.Stage] puts the contents into
// a data directory, where they are without effect until [Staged.Commit]. The node imports the images from there at its
// start, as it does from the images folder; package server/manifests applies the manifests.
//
// The package knows no setting of kedge, reads no archives of images, pulls none and talks to no node: the command gives it
// functions for that, which link containerd. Only package command, and main for the types of these functions, may import it.
package bundle
