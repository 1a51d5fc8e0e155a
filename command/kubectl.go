package command

import (
	"os"

	"github.com/urfave/cli/v2"

	"kedge/settings"
)

func (p *Program) kubectlCommand() *cli.Command {
	return &cli.Command{
		Name:      "kubectl",
		Usage:     "Run kubectl, by default against this machine's cluster",
		ArgsUsage: "ARGUMENTS",
		Description: "The cluster is taken from --kubeconfig, from the variable KUBECONFIG, or from the kubeconfig of this\n" +
			"machine's server (see --write-kubeconfig). If you may not read that file, or there is none, kubectl's own\n" +
			"default applies.",
		SkipFlagParsing: true,
		Action: func(c *cli.Context) error {
			if code := p.Kubectl(c.Args().Slice(), MachineKubeconfig()); code != 0 {
				return exitCode(code)
			}
			return nil
		},
	}
}

// MachineKubeconfig returns the path to which a server on this machine, started without flags, writes the
// administrator's kubeconfig. It ignores errors in configuration files, which the server reports.
func MachineKubeconfig() string {
	from := settings.Sources{Variables: os.LookupEnv}
	rows := settings.For(settings.Server)
	v, _ := settings.Resolve(rowsOf(settings.Config), from)
	var err error
	if from.Files, err = settings.ReadFiles(settings.Config.In(v), false); err != nil {
		return settings.DefaultKubeconfig
	}
	v, _ = settings.Resolve(rows, from)
	if file := settings.Kubeconfig.In(v); file != "" {
		return file
	}
	return settings.DefaultKubeconfig
}
