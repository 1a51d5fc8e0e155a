package command

import (
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"

	"kedge/appliance/release"
	"kedge/internal/errorkind"
)

func (p *Program) verifyCommand() *cli.Command {
	return leaf(cli.Command{
		Name:      "verify",
		Usage:     "Check the signature of a release, and the files of it in a folder; changes nothing",
		ArgsUsage: "FOLDER",
		Description: "FOLDER has the files SHA256SUMS, SHA256SUMS.minisig and VERSION of a release, and all or some of its\n" +
			"other files. Keys are trusted that this executable has, and those in " + release.TrustedKeysFile + ".",
	}, nil, func(c *call) error {
		if len(c.args) != 1 {
			return badUsage("give one folder with the files of a release")
		}
		keys, err := release.Trusted(release.TrustedKeysFile)
		if err != nil {
			return errorkind.Permanent(err)
		}
		f, err := release.VerifyFolder(c.args[0], keys)
		if err != nil {
			return err
		}
		fmt.Fprintf(c.out, "kedge %s: the signature and these files are right: %s\n", f.Version, strings.Join(f.Checked, ", "))
		if len(f.Absent) > 0 {
			fmt.Fprintf(c.out, "not in the folder: %s\n", strings.Join(f.Absent, ", "))
		}
		return nil
	})
}
