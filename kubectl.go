package main

import (
	"os"

	"github.com/urfave/cli/v2"
	basecli "k8s.io/component-base/cli"
	"k8s.io/component-base/logs"
	"k8s.io/kubectl/pkg/cmd"
	"k8s.io/kubectl/pkg/cmd/util"

	_ "k8s.io/client-go/plugin/pkg/client/auth" // kubeconfigs of other clusters may need them

	"kedge/internal/config"
)

func kubectlCommand() *cli.Command {
	return &cli.Command{
		Name:      "kubectl",
		Usage:     "Run kubectl, by default against this machine's cluster",
		ArgsUsage: "ARGUMENTS",
		Description: "The cluster is that of --kubeconfig, or of the variable KUBECONFIG; without these that of this machine's\n" +
			"server, whose kubeconfig is where --write-kubeconfig puts it; and kubectl's own default where there is none\n" +
			"that you may read.",
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
	// What the user names is the user's choice; kubectl's own default is for machines
	// without a cluster, and for users who may not read its kubeconfig.
	if os.Getenv("KUBECONFIG") == "" {
		file := machineKubeconfig()
		if f, err := os.Open(file); err == nil {
			f.Close()
			os.Setenv("KUBECONFIG", file)
		}
	}
	os.Args = append([]string{"kubectl"}, args...)
	_, _ = logs.GlogSetter(cmd.GetLogVerbosity(os.Args)) // a wrong -v is reported by kubectl's own parser
	if err := basecli.RunNoErrOutput(cmd.NewDefaultKubectlCommand()); err != nil {
		util.CheckErr(err) // prints and exits
	}
	return 0
}

// machineKubeconfig is where a server on this machine, started without flags, writes the
// administrator's kubeconfig. What is wrong with the configuration files is for the server
// to say: kubectl takes what can be read.
func machineKubeconfig() string {
	const key = "write-kubeconfig"
	if file := os.Getenv(env(key)[0]); file != "" {
		return file
	}
	path := os.Getenv(env("config")[0])
	if path == "" {
		path = defaultConfigFile
	}
	if files, err := config.Files(path, false); err == nil {
		values, _ := config.Load(files, configKeys(serverFlags()))
		if v, ok := values[key]; ok && v.Items[0] != "" {
			return v.Items[0]
		}
	}
	return defaultKubeconfig
}
