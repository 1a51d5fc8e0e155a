package command

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"kedge/server/snapshots/survivor"
	"kedge/settings"
)

func (p *Program) recoverCommand() *cli.Command {
	format := output("text", "json")
	yes := settings.Switch(settings.Setting{Name: "yes", NoVar: true, NoKey: true,
		Help: "Recover: make this server the only one of its cluster (default: only show what it holds)"})
	force := settings.Switch(settings.Setting{Name: "force", NoVar: true, NoKey: true,
		Help: "Recover also if another server answers, or is newer, so that writes may be lost"})
	compare := settings.Texts(settings.Setting{Name: "compare", NoVar: true, NoKey: true,
		Help: "`FILE` with what \"kedge recover -o json\" prints on another server, to find the newest (can be repeated)"})
	return leaf(cli.Command{
		Name: "recover", Usage: "Serve from this server again when the majority of the cluster's servers is gone for good; while kedge is stopped",
		Description: "Without --yes the command shows what this server holds, and which other servers answer. With --yes its\n" +
			"datastore becomes that of a cluster with one server. Everything that this server holds stays, and what was\n" +
			"there before is kept beside. Other servers must not start again with their old datastores: run \"kedge server\n" +
			"reset\" on them first. A recovery that is interrupted has changed nothing, or everything.",
	}, append(nodeRows(), rowsOf(yes, force, compare, format)...), func(c *call) error {
		if err := needRoot("recover a server"); err != nil {
			return err
		}
		asJSON := format.In(c.values) == "json"
		if asJSON && yes.In(c.values) {
			return badUsage("-o json is for showing what this server holds; leave it or --yes away")
		}
		var others []survivor.State
		for _, path := range compare.In(c.values) {
			other, err := survivor.ReadFile(path)
			if err != nil {
				return err
			}
			others = append(others, other)
		}
		n := Node{Values: c.values}
		if yes.In(c.values) {
			done, err := p.Recover(c.ctx, n, others, force.In(c.values))
			if err != nil {
				return err
			}
			c.printRecovered(done)
			return nil
		}
		state, err := p.Survivor(c.ctx, n)
		switch {
		case err != nil:
			return err
		case asJSON:
			return c.printJSON(state)
		}
		return c.printSurvivor(state, others)
	})
}

func (c *call) printRecovered(done Restored) {
	fmt.Fprintf(c.out, "this server is the only one of its cluster now, and its datastore goes on after revision %d\n", done.Revision)
	fmt.Fprintf(c.out, "the state of before is kept in %s\n", done.Kept)
	fmt.Fprintln(c.out, "start kedge now; before kedge starts on another server of the cluster, run \"kedge server reset\" there, and")
	fmt.Fprintln(c.out, "let it join with --server and a token of \"kedge token create --role server\"")
}

// printSurvivor prints what a server holds, in comparison with others, and what to do.
func (c *call) printSurvivor(s survivor.State, others []survivor.State) error {
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	for _, one := range append([]survivor.State{s}, others...) {
		printHeld(t, one)
	}
	fmt.Fprintln(t, "MEMBER\tVOTE\tADDRESSES\tSTATE")
	for _, m := range s.Members {
		vote := "yes"
		if m.Learner {
			vote = "no"
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", m.Name, vote, addressList(m.Addresses), memberState(m, s.NotAsked))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	fmt.Fprintln(c.out)
	err := s.Check(others)
	switch {
	case err == nil:
		fmt.Fprintln(c.out, "If the other servers are gone for good, \"kedge recover --yes\" makes this one the only server of its cluster.")
		fmt.Fprintln(c.out, "A stopped server does not answer, and may be newer: compare with what \"kedge recover\" shows there.")
	case errors.Is(err, survivor.ErrRefused):
		fmt.Fprintf(c.out, "\"kedge recover --yes\" needs --force here: %v\n", strings.TrimPrefix(err.Error(), survivor.ErrRefused.Error()+": "))
	default:
		fmt.Fprintf(c.out, "\"kedge recover --yes\" fails here: %v\n", err)
	}
	return nil
}

// printHeld prints what one server holds.
func printHeld(t io.Writer, s survivor.State) {
	lease := "none"
	if s.Lease != nil {
		lease = age(s.Lease.Renewed, s.Read) + ", by the clock of " + s.Lease.Holder
	}
	for _, row := range [][2]string{
		{"server", s.Server},
		{"last entry", fmt.Sprintf("%d of term %d", s.LastIndex, s.LastTerm)},
		{"committed", fmt.Sprintf("%d, at least", s.Committed)},
		{"term", fmt.Sprint(s.Term)},
		{"revision", fmt.Sprintf("%d, at least", s.Revision)},
		{"latest Lease", lease},
		{"log changed", age(s.Changed, s.Read) + ", by the clock of " + s.Server},
	} {
		fmt.Fprintf(t, "%s\t%s\n", row[0], row[1])
	}
	fmt.Fprintln(t)
}

func memberState(m survivor.Member, notAsked string) string {
	switch {
	case m.Self:
		return "this server"
	case m.Answers.IsValid():
		return "answers at " + m.Answers.String()
	case notAsked != "":
		return "not asked"
	}
	return "does not answer"
}

func addressList(all []netip.AddrPort) string {
	var out []string
	for _, a := range all {
		out = append(out, a.String())
	}
	if out == nil {
		return "-"
	}
	return strings.Join(out, ",")
}

// age is a time and how long before the reading of the files it was.
func age(at, read time.Time) string {
	if ago := read.Sub(at).Round(time.Second); ago >= 0 {
		return at.Format(time.RFC3339) + ", " + ago.String() + " before this was read"
	}
	return at.Format(time.RFC3339) + ", in the future"
}
