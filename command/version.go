package command

import (
	"fmt"
	"io"
	"runtime"

	"github.com/urfave/cli/v2"

	"kedge/appliance"
)

func (p *Program) versionCommand() *cli.Command {
	return leaf(cli.Command{Name: "version", Usage: "Print the versions of kedge and of its components"}, nil, func(c *call) error {
		p.printVersion(c.out)
		return nil
	})
}

func (p *Program) printVersion(out io.Writer) {
	fmt.Fprintf(out, "kedge %s (%s)\n", p.Version, p.Commit)
	for _, m := range p.Modules {
		if m.Version != "" {
			fmt.Fprintf(out, "%s %s\n", m.Name, m.Version)
		}
	}
	fmt.Fprintf(out, "data format %d\n", appliance.DataFormat)
	fmt.Fprintf(out, "%s %s/%s\n", runtime.Version(), runtime.GOOS, runtime.GOARCH)
}
