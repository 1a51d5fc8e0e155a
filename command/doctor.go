package command

import (
	"errors"
	"fmt"

	"github.com/urfave/cli/v2"

	"kedge/appliance/doctor"
	"kedge/internal/errorkind"
	"kedge/settings"
)

// hasProblems is the exit code of "kedge doctor" if something does not work.
const hasProblems = 3

var fixIt = settings.Switch(settings.Setting{Name: "fix", NoVar: true, NoKey: true, Help: "Repair what can be repaired safely, which are kernel parameters, and say what was done"})

func (p *Program) doctorCommand() *cli.Command {
	format := output("text", "json")
	rows := append(nodeRows(), fixIt.Row(), format.Row())
	return leaf(cli.Command{
		Name:  "doctor",
		Usage: "Find out what is wrong with this machine, its node and its cluster, and print remedies",
		Description: "It works while kedge runs, when kedge does not start, and on a machine without a node. Give it the flags of the\n" +
			"node. Nothing is changed without --fix, except for a temporary file that measures the disk. The exit code is 0\n" +
			"if nothing is wrong or there are only warnings, 3 if there are problems, and 1 if there are none and some check could\n" +
			"not be made.",
	}, rows, func(c *call) error {
		if err := needRoot("examine a node"); err != nil {
			return errors.New(err.Error()) // the exit code is that of a check that could not be made
		}
		n, err := p.node(c)
		if err != nil {
			return err
		}
		r := p.Doctor(c.ctx, n, fixIt.In(c.values))
		if format.In(c.values) == "json" {
			err = c.printJSON(r)
		} else {
			_, err = fmt.Fprint(c.out, r)
		}
		switch {
		case err != nil:
			return err
		case r.Has(doctor.Problem):
			return exitCode(hasProblems)
		case r.Has(doctor.Unknown):
			return exitCode(errorkind.ExitFailure)
		}
		return nil
	})
}

// nodeRows returns the settings of a node, for commands that have -o as --output.
func nodeRows() (rows []*settings.Setting) {
	for _, row := range settings.For(settings.Server) {
		if row.Short == "o" {
			row.Short = ""
		}
		rows = append(rows, row)
	}
	return rows
}
