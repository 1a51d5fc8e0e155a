// Package kubectl is kubectl in this executable. Its default cluster is this machine's.
//
// It is kubectl's own code with another default kubeconfig and has no command of its own. Only package main may
// import it.
package kubectl

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"k8s.io/client-go/tools/clientcmd"
	basecli "k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	"k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"

	_ "k8s.io/client-go/plugin/pkg/client/auth" // kubeconfigs of other clusters may need them

	"kedge/internal/errorkind"
)

// Run runs kubectl and returns its exit code. machines is the path of the kubeconfig of this machine's server. kubectl
// reads os.Args itself for plugins and verbosity, so Run sets os.Args as if kubectl had been called by its own name.
// On errors kubectl exits the process, with its own exit codes.
func Run(args []string, machines string) int {
	// The user's KUBECONFIG takes precedence. kubectl's own default applies to machines without a cluster, and to
	// users who may not read the cluster's kubeconfig.
	if os.Getenv("KUBECONFIG") == "" {
		if f, err := os.Open(machines); err == nil {
			f.Close()
			os.Setenv("KUBECONFIG", machines)
		}
	}
	if err := noCluster(args, machines); err != nil {
		fmt.Fprintln(os.Stderr, "kedge:", err)
		return errorkind.ExitFailure
	}
	os.Args = append([]string{"kubectl"}, args...)
	_, _ = logs.GlogSetter(cmd.GetLogVerbosity(os.Args)) // kubectl's own parser reports an invalid -v
	if err := basecli.RunNoErrOutput(cmd.NewDefaultKubectlCommand()); err != nil {
		util.CheckErr(err) // prints and exits
	}
	return 0
}

// noCluster returns an error if no cluster is configured, or this machine's server does not run: kubectl would try
// its default address and print several lines. It returns nil if kubectl may find a cluster, or needs none.
func noCluster(args []string, file string) error {
	named := func(arg string) bool {
		for _, flag := range []string{"--kubeconfig", "--server", "-s", "--context", "--cluster", "--help", "-h", "--client", "--dry-run=client"} {
			if arg == flag || strings.HasPrefix(arg, flag+"=") {
				return true
			}
		}
		return false
	}
	command := slices.IndexFunc(args, func(a string) bool { return !strings.HasPrefix(a, "-") })
	if command < 0 || slices.ContainsFunc(args, named) || os.Getenv("KUBERNETES_SERVICE_HOST") != "" ||
		slices.Contains([]string{"completion", "config", "help", "kustomize", "options", "plugin", "__complete", "__completeNoDesc"}, args[command]) {
		return nil
	}
	if given := os.Getenv("KUBECONFIG"); given != "" {
		if given != file {
			return nil
		}
		return notRunning(file)
	}
	if home, err := os.UserHomeDir(); err == nil {
		if _, err := os.Stat(filepath.Join(home, ".kube", "config")); err == nil {
			return nil
		}
	}
	if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("no cluster is configured: %s does not exist, and no other kubeconfig is given; start a cluster with \"kedge server\", or set --kubeconfig or the variable KUBECONFIG", file)
	}
	return fmt.Errorf("no permission to read the kubeconfig of this machine's cluster, %s; run the command as root, or give another kubeconfig with --kubeconfig", file)
}

// notRunning returns an error if the server of a kubeconfig, which is this machine's own, refuses connections.
func notRunning(file string) error {
	c, err := clientcmd.BuildConfigFromFlags("", file)
	if err != nil {
		return nil // kubectl reports errors in the file
	}
	u, err := url.Parse(c.Host)
	if err != nil || u.Port() == "" {
		return nil
	}
	conn, err := net.DialTimeout("tcp", u.Host, time.Second)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("the server of this machine's cluster is not running: no program listens at %s; start it with \"kedge server\", or see its log", u.Host)
	}
	if err == nil {
		conn.Close()
	}
	return nil
}
