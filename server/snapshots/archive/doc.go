// Package archive is the format of a snapshot of a cluster: one file that holds everything from which the cluster can be
// restored on a bare machine. It writes and reads archives as streams; what is in them, package snapshots knows.
//
// An archive begins with a line that names the format, and a line of JSON, the [Header], which anybody can read. An age file
// follows (https://age-encryption.org/v1), which the recovery key of the cluster or a passphrase opens. Decrypted, it is a tar
// archive that zstd has compressed: first the header again, which the encryption protects there, then the files, and last the
// database of the datastore. So in an emergency age, zstd, tar and etcdutl can read it without kedge:
//
//	tail -n +3 snapshot.kedge | age --decrypt -i recovery-key | zstd -d | tar x
//
// age authenticates every chunk and the end of the file, so an archive that was cut off or changed is never read as a whole
// one. Memory is bounded, whatever the size of the database.
//
// Package snapshots, the commands for snapshots and tests import it.
package archive
