package main

import (
	"os"
	"path/filepath"

	"github.com/urfave/cli/v2"
	basecli "k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	"k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"

	_ "k8s.io/client-go/plugin/pkg/client/auth" // kubeconfigs of other clusters may need them
)

func kubectlCommand() *cli.Command {
	return &cli.Command{
		Name:            "kubectl",
		Usage:           "Run kubectl, by default against this machine's cluster",
		ArgsUsage:       "ARGUMENTS",
		SkipFlagParsing: true,
		Action: func(c *cli.Context) error {
			if code := kubectl(c.Args().Slice()); code != 0 {
				return exitCode(code)
			}
			return nil
		},
	}
}

// kubectl runs the real kubectl. It reads os.Args itself for plugins and
// verbosity, so they are made to look as if it had been called by its own name.
// On errors it exits by itself, with kubectl's exit codes.
func kubectl(args []string) int {
	if os.Getenv("KUBECONFIG") == "" {
		home, _ := os.UserHomeDir()
		if _, err := os.Stat(filepath.Join(home, ".kube", "config")); err != nil {
			if _, err := os.Stat(defaultKubeconfig); err == nil {
				os.Setenv("KUBECONFIG", defaultKubeconfig)
			}
		}
	}
	os.Args = append([]string{"kubectl"}, args...)
	_, _ = logs.GlogSetter(cmd.GetLogVerbosity(os.Args)) // a wrong -v is reported by kubectl's own parser
	if err := basecli.RunNoErrOutput(cmd.NewDefaultKubectlCommand()); err != nil {
		util.CheckErr(err) // prints and exits
	}
	return 0
}
