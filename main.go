// Kedge is Kubernetes in one file: depending on the name under which it is called, this executable is the server and
// the node, the command line client, or the CNI plugin.
//
// Package main selects one of them, and provides the functions that the command line (package command) calls.
package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"runtime/debug"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	"k8s.io/klog/v2"

	"kedge/appliance/bundle"
	"kedge/appliance/doctor"
	"kedge/appliance/support"
	"kedge/assembly"
	"kedge/command"
	"kedge/command/kubectl"
	"kedge/internal/errorkind"
	"kedge/network/cniclient"
	"kedge/preflight"
	"kedge/runtime"
	"kedge/runtime/ctr"
	"kedge/server/importk3s"
	"kedge/server/snapshots"
	"kedge/server/snapshots/archive"
	"kedge/server/snapshots/s3"
	"kedge/server/snapshots/survivor"
	"kedge/throwaway/machine/supervisor"
)

// Set by the linker; see the Makefile.
var (
	version     = "dev"
	commit      = "unknown"
	buildDate   = "" // RFC 3339, of the commit, so that builds are reproducible
	runcVersion = "" // of the embedded program, which is not a dependency of this executable
)

func main() {
	// The launcher runs this program by a file that it has open, and without this the number of
	// that would be the name of the process in ps and top. It is of no other use.
	_ = os.WriteFile("/proc/self/comm", []byte("kedge"), 0)
	switch filepath.Base(os.Args[0]) {
	case "kubectl":
		os.Exit(kubectl.Run(os.Args[1:], command.MachineKubeconfig()))
	case "kedge-cni":
		os.Exit(cniclient.Main())
	}
	if code, was := supervisor.Main(os.Args); was {
		os.Exit(code)
	}
	host, err := assembly.ReadHost()
	if err != nil {
		fmt.Fprintln(os.Stderr, "kedge:", err)
		os.Exit(errorkind.ExitFailure)
	}
	os.Exit(program(host).Run(context.Background(), os.Args, os.Stdout, os.Stderr))
}

// program returns the command line of this executable on a machine.
func program(host assembly.Host) *command.Program {
	build := assembly.Build{Version: version}
	build.Time, _ = time.Parse(time.RFC3339, buildDate)
	node := func(n command.Node) assembly.Input {
		return assembly.Input{Values: n.Values, Host: host, Build: build, Token: n.Token, Warnings: n.Warnings, Role: n.Role}
	}
	return &command.Program{
		Version: version, Commit: commit, Modules: modules(), Launcher: host.Launcher,
		Server:  func(ctx context.Context, n command.Node) error { return assembly.RunServer(ctx, node(n)) },
		Agent:   func(ctx context.Context, n command.Node) error { return assembly.RunAgent(ctx, node(n)) },
		KillAll: func(ctx context.Context, n command.Node) error { return assembly.KillAll(ctx, node(n)) },
		Check: func(ctx context.Context, n command.Node) ([]preflight.Result, bool, error) {
			return assembly.Check(ctx, node(n))
		},
		Doctor: func(ctx context.Context, n command.Node, fix bool) doctor.Report {
			return assembly.Doctor(ctx, node(n), fix)
		},
		SupportBundle: func(ctx context.Context, n command.Node, version string, w io.Writer) (support.Summary, error) {
			return assembly.SupportBundle(ctx, node(n), version, w)
		},
		Restore: func(ctx context.Context, n command.Node, file string, lock archive.Lock, force bool) (command.Restored, error) {
			done, err := assembly.Restore(ctx, node(n), file, lock, force)
			return command.Restored{Snapshot: done.Header, Revision: done.Revision, Kept: done.Kept, NewNode: done.NewNode}, err
		},
		Survivor: func(ctx context.Context, n command.Node) (survivor.State, error) {
			return assembly.Survivor(ctx, node(n))
		},
		Recover: func(ctx context.Context, n command.Node, others []survivor.State, force bool) (command.Restored, error) {
			done, err := assembly.Recover(ctx, node(n), others, force)
			return command.Restored{Revision: done.Revision, Kept: done.Kept}, err
		},
		Bucket: func(ctx context.Context, n command.Node) (command.Bucket, error) {
			b, err := assembly.OpenBucket(ctx, node(n))
			if err != nil {
				return nil, err
			}
			return bucket{b}, nil
		},
		ResetServer:  func(n command.Node) (string, error) { return assembly.ResetServer(node(n)) },
		Certificates: command.Certificates{List: assembly.Certificates, Rotate: assembly.RotateCertificates},
		ImportK3s:    importK3s,
		LinkPrefixes: assembly.LinkPrefixes,
		Kubectl:      kubectl.Run,
		Containers: command.Containers{
			Socket: func(runDir string) string {
				cfg := runtime.DefaultConfig()
				cfg.RunDir = runDir
				return cfg.Socket()
			},
			List: runtime.ListImages, Import: runtime.ImportImages, Remove: runtime.RemoveImages, Pull: runtime.PullImages, Export: runtime.ExportImages,
			Ctr: ctr.Run, ReadArchive: readArchive, Fetch: fetchImage,
		},
	}
}

// importK3s imports the objects of a k3s cluster.
func importK3s(ctx context.Context, in command.K3sImport) (done command.K3sImported, err error) {
	// Kubernetes' code logs each value that it cannot decrypt, and the result names them.
	klog.SetSlogLogger(slog.New(slog.DiscardHandler))
	snapshot, err := importk3s.Read(ctx, importk3s.Source{File: in.Snapshot, Token: in.Token, Config: in.EncryptionConfig})
	if err != nil {
		return done, errorkind.Permanent(err)
	}
	client, err := clientcmd.BuildConfigFromFlags("", in.Kubeconfig)
	if err != nil {
		return done, errorkind.Permanent(fmt.Errorf("read the kubeconfig: %w; give it with --kubeconfig", err))
	}
	importer, err := importk3s.NewImporter(client, importk3s.Options{DryRun: in.DryRun, Overwrite: in.Overwrite})
	if err != nil {
		return done, err
	}
	report, err := importer.Run(ctx, snapshot)
	for _, e := range report.Entries {
		done.Objects = append(done.Objects, command.ImportedObject{
			Outcome: string(e.Outcome), Kind: e.Kind, Namespace: e.Namespace, Name: e.Name, Count: e.Count, Reason: e.Reason,
		})
	}
	done.Notices, done.Failed = report.Notices, report.Failures()
	return done, err
}

// bucket is an S3 bucket for the commands.
type bucket struct{ *s3.Bucket }

func (b bucket) List(ctx context.Context) ([]command.Stored, error) {
	all, err := b.Bucket.List(ctx)
	var out []command.Stored
	for _, o := range all {
		out = append(out, command.Stored{Name: o.Name, Size: o.Size, Node: o.Meta[snapshots.MetaNode], Taken: o.Meta[snapshots.MetaTaken], Revision: o.Meta[snapshots.MetaRevision]})
	}
	return out, err
}

func (b bucket) Prune(ctx context.Context, prefix, node string, keep int) ([]string, error) {
	return snapshots.PruneRemote(ctx, b.Bucket, prefix, node, keep)
}

// readArchive and fetchImage read images for bundles.
func readArchive(ctx context.Context, name string, r io.Reader, dir string) (all []bundle.Image, err error) {
	found, err := runtime.ReadArchive(ctx, name, r, dir)
	for _, img := range found {
		all = append(all, bundle.Image{Name: img.Name, Descriptor: img.Target})
	}
	return all, err
}

func fetchImage(ctx context.Context, registriesFile, image string, architectures []string, dir string) (bundle.Image, error) {
	img, err := runtime.FetchImage(ctx, registriesFile, image, architectures, dir)
	return bundle.Image{Name: img.Name, Descriptor: img.Target}, err
}

// modules returns the components whose versions "kedge version" prints.
func modules() []command.Module {
	info, built := debug.ReadBuildInfo()
	linked := func(path string) string {
		if !built {
			return ""
		}
		for _, dep := range info.Deps {
			if dep.Path == path {
				return dep.Version
			}
		}
		return ""
	}
	return []command.Module{
		{Name: "Kubernetes", Version: linked("k8s.io/kubernetes")},
		{Name: "etcd", Version: linked("go.etcd.io/etcd/server/v3")},
		{Name: "containerd", Version: linked("github.com/containerd/containerd/v2")},
		{Name: "runc", Version: runcVersion},
	}
}
