// Package keptfiles lists every file that kedge keeps: its content, and the consequences when it is missing or damaged.
// A test with a real node walks over the list, and fails for a file that is not on it; docs/files.md contains
// the list.
//
// The package has only the list: kedge itself does not use it. Tests import it.
package keptfiles

import (
	"fmt"
	"path"
	"strings"
)

// Outcome is the effect of a damage at the next start.
type Outcome string

// There are no other outcomes: kedge never starts with less data than before without a message.
const (
	Same     Outcome = "no effect" // the file is not read, or its content can be determined otherwise
	Again    Outcome = "recreated" // without loss
	Repaired Outcome = "repaired"  // with a message in the log
	Refused  Outcome = "refused"   // kedge exits with an error that names the file and the remedy
)

// Damage is a kind of damage to a file.
type Damage int

// The kinds of damage. Read-only files are not included: kedge runs as root, for whom file modes have no
// effect. On a read-only file system kedge, or the component that needs it, does not start, and the error names
// the directory.
const (
	Missing   Damage = iota
	Empty            // no content
	Truncated        // only the first half is there
	Flipped          // some bits are flipped
	Foreign          // the file belongs to another node
	damages
)

// String returns the name of the damage.
func (d Damage) String() string {
	return [...]string{"missing", "empty", "truncated", "bits flipped", "another node's"}[d]
}

// Damages returns all kinds of damage.
func Damages() (all []Damage) {
	for d := range damages {
		all = append(all, d)
	}
	return all
}

// Dir is the directory to which a path is relative.
type Dir string

// The directories.
const (
	Data Dir = "<data-dir>"
	Run  Dir = "<run-dir>"
)

// File is a file, or several files of the same kind.
type File struct {
	Dir Dir
	// Path is a pattern: "*" matches a part of a name, and "**" at the end matches any path.
	Path  string
	Holds string
	On    [damages]Outcome
	// Passing means that the file exists only at times.
	Passing bool
}

func all(o Outcome) [damages]Outcome { return [damages]Outcome{o, o, o, o, o} }

// but returns the outcomes of a file that is handled differently if it is missing.
func but(missing, others Outcome) [damages]Outcome {
	return [damages]Outcome{missing, others, others, others, others}
}

// Files returns the list.
func Files() []File {
	return append(append(serverFiles(), agentFiles()...), nodeFiles()...)
}

func serverFiles() []File {
	f := []File{
		{Dir: Data, Path: "kedge.json", Holds: "the node that the directory belongs to, the last version of kedge, and whether there was a datastore, of its own or external", On: but(Again, Refused)},
		{Dir: Data, Path: "kedge.lock", Holds: "the lock of the process that uses the directory", On: all(Same)},
		{Dir: Data, Path: "server/encryption-config.yaml", Holds: "the encryption key of Secrets in the datastore", On: all(Refused)},
		{Dir: Data, Path: "server/known.json", Holds: "fingerprints of the cluster's essential keys", On: [damages]Outcome{Again, Again, Again, Again, Refused}},
		{Dir: Data, Path: "server/manifests.json", Holds: "which manifests of the bundle were applied, by their hashes", On: all(Again), Passing: true},
		{Dir: Data, Path: "server/servers.json", Holds: "the last known list of the cluster's servers", On: [damages]Outcome{Same, Repaired, Repaired, Repaired, Same}},
		{Dir: Data, Path: "server/token", Holds: "the token derived from a fixed --token", On: all(Again), Passing: true},
		{Dir: Data, Path: "server/server-token", Holds: "the token derived from a fixed --server-token", On: all(Again), Passing: true},
		{Dir: Data, Path: "server/joined.json", Holds: "the settings that a server received when it joined other servers, or from a snapshot", On: all(Refused), Passing: true},
		{Dir: Data, Path: "server/recovery-key", Holds: "a copy of the key that opens the cluster's snapshots", On: all(Again)},
		{Dir: Data, Path: "server/restored.json", Holds: "the snapshot from which the server was restored, which only \"kedge snapshot restore\" reads", On: all(Same), Passing: true},
		{Dir: Data, Path: "server/joining", Holds: "nothing; the file exists while the machine joins a cluster", On: all(Same), Passing: true},
		{Dir: Data, Path: "server/store/lock", Holds: "nothing; the process that has opened the datastore locks it", On: all(Same)},
		{Dir: Data, Path: "server/store/new", Holds: "nothing; the file exists until the datastore was ready once", On: all(Same), Passing: true},
		{Dir: Data, Path: "server/store/opened", Holds: "nothing; the file exists while the last file of the log has its full size", On: all(Same)},
		{Dir: Data, Path: "server/store/removed", Holds: "nothing; the file exists after this server was removed", On: all(Same), Passing: true},
		{Dir: Data, Path: "server/store/reserve", Holds: "reserved space for essential writes when the disk is full", On: all(Again), Passing: true},
		{Dir: Data, Path: "server/store/peers.json", Holds: "the peer addresses of the other servers' datastores", On: but(Again, Repaired)},
		{Dir: Data, Path: "server/store/sealed.json", Holds: "checksums of the datastore's files after an orderly stop", On: but(Same, Repaired), Passing: true},
		{Dir: Data, Path: "server/store/member/snap/db", Holds: "the database", On: all(Refused)},
		{Dir: Data, Path: "server/store/member/wal/*.wal", Holds: "the write-ahead log", On: all(Refused)},
		{Dir: Data, Path: "server/store/member/wal/*.tmp", Holds: "nothing yet: the log's next file, preallocated", On: all(Again), Passing: true},
		{Dir: Data, Path: "server/store/member/wal/*.broken", Holds: "a part of the log that an earlier kedge has cut off", On: all(Same), Passing: true},
		{Dir: Data, Path: "server/store/member/snap/*.snap", Holds: "raft's snapshots, which are not read again", On: all(Same), Passing: true},
		{Dir: Data, Path: "server/store/member/snap/*.snap.db", Holds: "a database that is being received from another server", On: all(Same), Passing: true},
		{Dir: Data, Path: "server/store/member/snap/db.tmp.*", Holds: "a copy of the database, during its defragmentation", On: all(Same), Passing: true},
		{Dir: Data, Path: "server/store.removed-*/**", Holds: "the old datastore of a server that was removed and has joined again", On: all(Same), Passing: true},
	}
	for _, ca := range []struct{ name, of string }{
		{"server-ca", "the API's certificate"}, {"client-ca", "clients of the API"}, {"kubelet-ca", "kubelets' serving certificates"},
		{"request-header-ca", "the aggregator's proxy"}, {"peer-ca", "peer links between datastores"},
	} {
		f = append(f,
			File{Dir: Data, Path: "server/tls/" + ca.name + ".crt", Holds: "the authority of " + ca.of, On: all(Refused)},
			File{Dir: Data, Path: "server/tls/" + ca.name + ".key", Holds: "its key", On: all(Refused)})
	}
	f = append(f,
		File{Dir: Data, Path: "server/tls/service-account.key", Holds: "the key that signs tokens of service accounts", On: all(Refused)},
		File{Dir: Data, Path: "server/tls/serving-kubelet.key", Holds: "the key of this server's node", On: all(Refused)})
	for _, leaf := range []struct{ name, holds string }{
		{"serving-kube-apiserver", "the API's certificate"}, {"client-kube-apiserver", "the API server's client certificate for kubelets"},
		{"client-admin", "the administrator's client certificate"}, {"client-auth-proxy", "the aggregator's client certificate"}, {"peer", "the datastore's certificate for peer links"},
	} {
		f = append(f,
			File{Dir: Data, Path: "server/tls/" + leaf.name + ".crt", Holds: leaf.holds, On: all(Again)},
			File{Dir: Data, Path: "server/tls/" + leaf.name + ".key", Holds: "its key", On: all(Again)})
	}
	return append(f,
		File{Dir: Data, Path: "server/tls/serving-kubelet.crt", Holds: "the kubelet's certificate", On: all(Again)},
		File{Dir: Data, Path: "server/tls/pods-ca.crt", Holds: "the authorities in pods' service account volumes", On: all(Again)},
		File{Dir: Data, Path: "server/tls/client-node.crt", Holds: "the node's client certificate for other servers", On: all(Again)})
}

func agentFiles() []File {
	return []File{
		{Dir: Data, Path: "agent/node.key", Holds: "the key that identifies an agent", On: all(Refused)},
		{Dir: Data, Path: "agent/node.crt", Holds: "the kubelet's client certificate", On: all(Again)},
		{Dir: Data, Path: "agent/network.crt", Holds: "the data path's client certificate", On: all(Again)},
		{Dir: Data, Path: "agent/kubelet.crt", Holds: "the kubelet's serving certificate", On: all(Again)},
		{Dir: Data, Path: "agent/server-ca.crt", Holds: "the authority of the API", On: [damages]Outcome{Refused, Refused, Refused, Refused, Same}},
		{Dir: Data, Path: "agent/client-ca.crt", Holds: "the authority of the kubelet's clients", On: all(Again)},
		{Dir: Data, Path: "agent/cluster.json", Holds: "the cluster's settings, as last received from a server", On: [damages]Outcome{Refused, Refused, Refused, Refused, Same}},
		{Dir: Data, Path: "witness/node.key", Holds: "the key that identifies a witness", On: all(Refused)},
		{Dir: Data, Path: "witness/server-ca.crt", Holds: "the authority of the API", On: [damages]Outcome{Refused, Refused, Refused, Refused, Same}},
		{Dir: Data, Path: "witness/peer.crt", Holds: "the certificate of a witness's datastore", On: all(Again)},
		{Dir: Data, Path: "witness/peer-ca.crt", Holds: "the authority of the datastores", On: all(Again)},
		{Dir: Data, Path: "witness/joined.json", Holds: "the admission to the datastore, and the settings of the cluster", On: [damages]Outcome{Refused, Refused, Refused, Refused, Same}},
		{Dir: Data, Path: "witness/store/**", Holds: "a witness's datastore, whose files are those of server/store", On: all(Refused)},
		{Dir: Data, Path: "witness/store.removed-*/**", Holds: "the old datastore of a witness that was removed and has joined again", On: all(Same), Passing: true},
		{Dir: Data, Path: "agent/servers.json", Holds: "the last known list of the cluster's servers", On: [damages]Outcome{Same, Repaired, Repaired, Repaired, Same}},
	}
}

func nodeFiles() []File {
	return []File{
		{Dir: Data, Path: "install.json", Holds: "the journal of \"kedge install\", which only that and \"kedge uninstall\" read", On: all(Same), Passing: true},
		{Dir: Data, Path: "previous/kedge", Holds: "the executable of before the last upgrade", On: all(Same), Passing: true},
		{Dir: Data, Path: "upgrade/**", Holds: "the upgrade that is on trial, and the results of earlier ones; while they are damaged, the version of before runs", On: all(Same), Passing: true},
		{Dir: Data, Path: "snapshots/**", Holds: "snapshots of the cluster, and the datastore of a server as it was before its last two upgrades", On: all(Same), Passing: true},
		{Dir: Data, Path: ".restore-*.kedge", Holds: "a snapshot that a restore has downloaded", On: all(Same), Passing: true},
		{Dir: Data, Path: "restore.json", Holds: "the restore that is in progress", On: all(Same), Passing: true},
		{Dir: Data, Path: "server.new/**", Holds: "the state that a restore makes", On: all(Same), Passing: true},
		{Dir: Data, Path: "recover.new/**", Holds: "the copy in which a recovery reads the datastore", On: all(Same), Passing: true},
		{Dir: Data, Path: "server.before-restore-*/**", Holds: "the state of a server before a snapshot was restored, or before \"kedge recover\"", On: all(Same), Passing: true},
		{Dir: Data, Path: "bundle/**", Holds: "manifests and charts of the installed bundle; \"kedge install\" from the bundle writes them again", On: all(Same), Passing: true},
		{Dir: Data, Path: "program/*/*", Holds: "the unpacked program", On: all(Again)},
		{Dir: Data, Path: "runtime/*/*", Holds: "the unpacked shim and runc", On: all(Again)},
		{Dir: Data, Path: "cni/bin/kedge-cni", Holds: "a link to kedge", On: all(Again)},
		{Dir: Data, Path: "cni/net.d/10-kedge.conflist", Holds: "the CNI plugin's configuration", On: all(Again)},
		{Dir: Data, Path: "disk-probe", Holds: "nothing; kedge writes the file to detect a stalling disk", On: all(Again), Passing: true},
		{Dir: Data, Path: "images/**", Holds: "an administrator's archives, and the images of the installed bundle", On: all(Same), Passing: true},
		{Dir: Data, Path: "pod-manifests/**", Holds: "an administrator's static pods", On: all(Same), Passing: true},
		{Dir: Data, Path: "log/**", Holds: "logs of containers", On: all(Same), Passing: true},
		{Dir: Data, Path: "containerd/imported.json", Holds: "the list of imported archives", On: all(Again)},
		{Dir: Data, Path: "containerd/images.json", Holds: "the names of all images and their blobs", On: all(Again)},
		{Dir: Data, Path: "containerd/snapshotter", Holds: "the chosen snapshotter", On: all(Again)},
		{Dir: Data, Path: "containerd/lock", Holds: "nothing; the runtime locks it", On: all(Same)},
		{Dir: Data, Path: "containerd/io.containerd.grpc.v1.introspection/uuid", Holds: "containerd's UUID", On: all(Again)},
		{Dir: Data, Path: "containerd/io.containerd.metadata.v1.bolt/meta.db", Holds: "the list of images and containers", On: all(Repaired)},
		{Dir: Data, Path: "containerd/io.containerd.snapshotter.v1.*/metadata.db", Holds: "the list of layers", On: all(Repaired)},
		{Dir: Data, Path: "containerd/io.containerd.content.v1.content/**", Holds: "images", On: all(Repaired)},
		{Dir: Data, Path: "containerd/io.containerd.snapshotter.v1.*/snapshots/**", Holds: "layers of images and of containers; their content cannot be verified", On: all(Same)},
		{Dir: Data, Path: "containerd/**", Holds: "containerd's other state", On: all(Same), Passing: true},
		{Dir: Data, Path: "containerd-damaged-*/**", Holds: "damaged databases of containerd, kept for analysis", On: all(Same), Passing: true},
		{Dir: Data, Path: "kubelet/*_state", Holds: "resources that the kubelet has assigned to pods", On: all(Again)},
		{Dir: Data, Path: "kubelet/**", Holds: "volumes and sockets of pods", On: all(Same), Passing: true},
		{Dir: Run, Path: "kedge.lock", Holds: "the lock of the process that uses the directory", On: all(Same)},
		{Dir: Run, Path: "parameters.json", Holds: "kernel parameters as they were before kedge's first start since the boot, for \"kedge uninstall\"", On: [damages]Outcome{Again, Again, Again, Again, Same}},
		{Dir: Run, Path: "*.sock", Holds: "sockets", On: all(Again)},
		{Dir: Run, Path: "network/leases/leases.journal", Holds: "addresses of pods, which the kernel knows too", On: all(Again)},
		{Dir: Run, Path: "network/leases/lock", Holds: "nothing; the process that manages the leases locks it", On: all(Same)},
		{Dir: Run, Path: "network/wireguard.key", Holds: "the node's WireGuard key, if traffic between nodes is encrypted", On: all(Again), Passing: true},
		{Dir: Run, Path: "containerd/io.containerd.mount-manager.v1.bolt/mounts.db", Holds: "containerd's mounts", On: all(Again)},
		{Dir: Run, Path: "containerd/**", Holds: "state of running containers", On: all(Same), Passing: true},
		{Dir: Run, Path: "runc/**", Holds: "runc's state of running containers", On: all(Same), Passing: true},
		{Dir: Run, Path: "s/*", Holds: "sockets of shims", On: all(Same), Passing: true},
		{Dir: Run, Path: "cni/cache/**", Holds: "the CNI plugin's results for running pods", On: all(Same), Passing: true},
		{Dir: Run, Path: "network/**", Holds: "network namespaces", On: all(Same), Passing: true},
	}
}

// Find returns the first entry that matches the file at a path below a directory.
func Find(dir Dir, name string) (File, bool) {
	for _, f := range Files() {
		if f.Dir == dir && f.matches(name) {
			return f, true
		}
	}
	return File{}, false
}

func (f File) matches(name string) bool {
	if below, ok := strings.CutSuffix(f.Path, "/**"); ok {
		parts := strings.Split(name, "/")
		n := strings.Count(below, "/") + 1
		if len(parts) <= n {
			return false
		}
		ok, err := path.Match(below, strings.Join(parts[:n], "/"))
		return ok && err == nil
	}
	ok, err := path.Match(f.Path, name)
	return ok && err == nil
}

// Table returns the list as a table for docs/files.md.
func Table() string {
	var b strings.Builder
	b.WriteString("| File | Content |")
	for _, d := range Damages() {
		fmt.Fprintf(&b, " %s |", d)
	}
	b.WriteString("\n|---|---|" + strings.Repeat("---|", int(damages)) + "\n")
	for _, f := range Files() {
		fmt.Fprintf(&b, "| `%s/%s` | %s |", f.Dir, f.Path, f.Holds)
		for _, o := range f.On {
			fmt.Fprintf(&b, " %s |", o)
		}
		b.WriteString("\n")
	}
	return b.String()
}
