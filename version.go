package main

import (
	"fmt"
	goruntime "runtime"
	"runtime/debug"
	"time"

	"github.com/urfave/cli/v2"
)

// Set by the linker; see the Makefile.
var (
	version   = "dev"
	commit    = "unknown"
	buildDate = "" // RFC 3339, of the commit, so that builds are reproducible
)

// buildTime is when this executable's source was committed. No correct clock
// shows an earlier time. It is zero in a build without the Makefile.
func buildTime() time.Time {
	t, _ := time.Parse(time.RFC3339, buildDate)
	return t
}

// components are the modules whose versions users ask for.
var components = []struct{ name, module string }{
	{"Kubernetes", "k8s.io/kubernetes"},
	{"etcd", "go.etcd.io/etcd/server/v3"},
	{"containerd", "github.com/containerd/containerd/v2"},
	{"runc", "github.com/opencontainers/runc"},
}

func versionCommand() *cli.Command {
	return &cli.Command{
		Name:  "version",
		Usage: "Print the versions of kedge and of what is in it",
		Action: func(c *cli.Context) error {
			fmt.Fprintf(c.App.Writer, "kedge %s (%s)\n", version, commit)
			info, ok := debug.ReadBuildInfo()
			for _, m := range components {
				v := moduleVersions[m.module]
				for _, dep := range info.Deps {
					if ok && dep.Path == m.module {
						v = dep.Version
					}
				}
				if v != "" {
					fmt.Fprintf(c.App.Writer, "%s %s\n", m.name, v)
				}
			}
			fmt.Fprintf(c.App.Writer, "%s %s/%s\n", goruntime.Version(), goruntime.GOOS, goruntime.GOARCH)
			return nil
		},
	}
}

// moduleVersions are of programs that travel inside the executable and are not
// linked into it.
var moduleVersions = map[string]string{"github.com/opencontainers/runc": runcVersion}

var runcVersion = "" // set by the linker
