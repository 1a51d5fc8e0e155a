// Package s3 keeps snapshots in a bucket of an S3 server: it uploads, lists, downloads and removes objects of one folder.
//
// A transfer goes on after the connection was broken. An upload of more than one part sends only the part again that was
// cut off, and a download requests what it lacks. Both give up when nothing has got through for [Config.Timeout], however
// long they take otherwise. What an upload that never ended has left on the server is removed by the next upload.
//
// Memory does not depend on the size of an object: parts are read from the file while they are sent, one at a time.
//
// The package knows nothing of what is in a snapshot, and of how many are kept. It is the only one that imports minio-go. It
// may be imported by packages of server, and by assembly and command.
package s3
