package command

import (
	"cmp"
	"errors"
	"fmt"
	"net/url"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"kedge/internal/control"
	"kedge/settings"
)

// accountKeyStatus is the command that shows how far a change is.
const accountKeyStatus = "kedge service-account-key status"

func accountKeyCommand() *cli.Command {
	return &cli.Command{
		Name:   "service-account-key",
		Usage:  "Show and replace the key that signs the tokens of service accounts; on any server",
		Action: subcommandsOnly,
		Subcommands: []*cli.Command{
			leaf(cli.Command{Name: "status", Usage: "Show the key, how far a change is, and what each server has"}, rowsOf(settings.RunDir), showAccountKeys),
			rotateAccountKeyCommand(),
			finishAccountKeyCommand(),
		},
	}
}

func accountKeys(c *call) (s control.AccountKeys, err error) {
	err = control.Get(c.ctx, settings.RunDir.In(c.values), control.AccountKeysPath, nil, &s)
	return s, explainOldKeys(err)
}

// explainOldKeys explains the error of a kedge that is older than these commands.
func explainOldKeys(err error) error {
	if errors.Is(err, control.ErrUnknownRequest) {
		return errors.New("the running kedge is older than this command and cannot replace the key of service accounts' tokens; upgrade it")
	}
	return err
}

func showAccountKeys(c *call) error {
	s, err := accountKeys(c)
	if err != nil {
		return err
	}
	signs := s.Signs
	if s.Foreign != "" {
		signs = "not managed by kedge: " + s.Foreign
	}
	fmt.Fprintf(c.out, "Signing key:  %s\n", signs)
	if !s.Began.IsZero() {
		fmt.Fprintf(c.out, "Last change:  %s\n", describeKeyChange(s))
	}
	if n := len(s.Secrets); n > 0 {
		fmt.Fprintf(c.out, "Secrets with tokens of the old key: %d (%s)\n", n, strings.Join(s.Secrets, ", "))
	}
	fmt.Fprintln(c.out)
	t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(t, "SERVER\tKEYS\tOLD KEY USED\tSTATE")
	for _, server := range s.Servers {
		var keys []string
		for _, k := range server.Keys {
			keys = append(keys, shortKey(k))
		}
		state, used := "current", "-"
		switch {
		case server.Problem != "":
			state = server.Problem
		case !server.Current:
			state = "not current"
		}
		if !server.OldUsed.IsZero() {
			used = server.OldUsed.Local().Format(time.DateTime)
		}
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\n", server.Name, cmp.Or(strings.Join(keys, ","), "-"), used, state)
	}
	return t.Flush()
}

// shortKey is the beginning of a key's ID.
func shortKey(id string) string { return id[:min(8, len(id))] }

// keyStages says what is done in a stage.
var keyStages = map[string]string{
	"distribute": "stage 1 of 4, every server gets the new key and accepts its tokens",
	"switch":     "stage 2 of 4, every server begins to sign with it",
	"drop":       "stage 4 of 4, every server forgets the old key",
}

// describeKeyChange says how far a change is.
func describeKeyChange(s control.AccountKeys) string {
	switch s.Stage {
	case "":
		return "ended " + s.Ended.Local().Format(time.DateTime)
	case "keep":
		return fmt.Sprintf("stage 3 of 4, all servers sign with the new key since %s, and tokens of the old one are accepted until \"kedge service-account-key finish\"; that can be done from %s on",
			s.Switched.Local().Format(time.DateTime), s.FinishFrom.Local().Format(time.DateTime))
	}
	text := keyStages[s.Stage]
	if s.Waits != "" {
		text += "; it waits: " + s.Waits
	}
	return text
}

func rotateAccountKeyCommand() *cli.Command {
	publish := settings.Duration(settings.Setting{Name: "publish-for", Default: "0s", NoVar: true,
		Help: "`TIME` for which the new key is published before it signs, for services outside of the cluster that verify tokens; they may read the keys once an hour"})
	noWait := settings.Switch(settings.Setting{Name: "no-wait", NoVar: true, Help: "return when the change has begun"})
	return leaf(cli.Command{
		Name:  "rotate",
		Usage: "Have all servers sign with a new key, without a restart; tokens of the old one are accepted until \"finish\"",
		Description: "All servers get a new key and accept its tokens, then all of them sign with it. A server that is away is\n" +
			"waited for. The change goes on when this command is interrupted, when a server restarts, and when another\n" +
			"server leads. It is not over before \"finish\".",
	}, rowsOf(settings.RunDir, publish, noWait), func(c *call) error {
		err := control.Post(c.ctx, settings.RunDir.In(c.values), control.RotateAccountKeysPath, url.Values{"publish": {publish.In(c.values).String()}}, &struct{}{})
		if err != nil || noWait.In(c.values) {
			return explainOldKeys(err)
		}
		return followKeys(c, "keep")
	})
}

func finishAccountKeyCommand() *cli.Command {
	force := settings.Switch(settings.Setting{Name: "force", NoVar: true, Help: "forget the old key although it may be in use: whoever has only a token of it is refused"})
	noWait := settings.Switch(settings.Setting{Name: "no-wait", NoVar: true, Help: "return when the servers begin to forget the key"})
	return leaf(cli.Command{
		Name:  "finish",
		Usage: "Have all servers forget the old key, whose tokens are refused from then on",
		Description: "It is refused while Secrets have tokens of the old key, for a day after the switch, in which kubelets\n" +
			"replace the tokens of all pods, and while tokens of the old key were shown to the API within the last hour.",
	}, rowsOf(settings.RunDir, force, noWait), func(c *call) error {
		err := control.Post(c.ctx, settings.RunDir.In(c.values), control.FinishAccountKeysPath, url.Values{"force": {strconv.FormatBool(force.In(c.values))}}, &struct{}{})
		if err != nil || noWait.In(c.values) {
			return explainOldKeys(err)
		}
		return followKeys(c, "")
	})
}

// followKeys prints how far a change is until it is in a stage, or over.
func followKeys(c *call, until string) error {
	return follow(c, accountKeyStatus, func() (string, bool, error) {
		s, err := accountKeys(c)
		return describeKeyChange(s), s.Stage == until || s.Stage == "", err
	})
}
