package command

import (
	"errors"
	"fmt"
	"net/url"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/urfave/cli/v2"

	"kedge/internal/control"
	"kedge/settings"
)

func (p *Program) secretsEncryptCommand() *cli.Command {
	return &cli.Command{
		Name:   "secrets-encrypt",
		Usage:  "Show and change how Secrets are encrypted in the datastore; on any server",
		Action: subcommandsOnly,
		Subcommands: []*cli.Command{
			encryptionStatusCommand(),
			changeCommand("rotate", cli.Command{
				Usage: "Replace the key that encrypts Secrets, without a restart",
				Description: "All servers get a new key, then all of them write with it, then all Secrets are rewritten, and\n" +
					"then the old key is forgotten. Copies of the datastore from before need the old key: keep a copy of\n" +
					"DATA-DIR/server/encryption-config.yaml with them.",
			}),
			changeCommand("enable", cli.Command{
				Usage:       "Encrypt Secrets with a new key, without a restart",
				Description: "Encryption is on from the first start. This is for a cluster in which it was disabled.",
			}),
			changeCommand("disable", cli.Command{
				Usage: "Write Secrets unencrypted, without a restart",
				Description: "All Secrets are rewritten as plain text: everybody who can read the files of the datastore, or a\n" +
					"copy of them, can then read all passwords and keys in the cluster. The key is forgotten.",
			}),
		},
	}
}

func encryptionStatusCommand() *cli.Command {
	return leaf(cli.Command{Name: "status", Usage: "Show the provider and key, how far a change is, and what each server has"}, rowsOf(settings.RunDir), func(c *call) error {
		var s control.SecretsEncryption
		if err := control.Get(c.ctx, settings.RunDir.In(c.values), control.SecretsEncryptionPath, nil, &s); err != nil {
			return explainOldServer(err)
		}
		fmt.Fprintf(c.out, "Encryption of Secrets: %s\n", describeEncryption(s))
		if s.Change != "" {
			fmt.Fprintf(c.out, "Last change:           %s\n", describeChange(s))
		}
		fmt.Fprintln(c.out)
		t := tabwriter.NewWriter(c.out, 0, 0, 2, ' ', 0)
		fmt.Fprintln(t, "SERVER\tKEYS\tSTATE")
		for _, server := range s.Servers {
			keys, state := strings.Join(server.Keys, ","), "current"
			switch {
			case server.Problem != "":
				state = server.Problem
			case !server.Current:
				state = "not current"
			}
			if keys == "" {
				keys = "-"
			}
			fmt.Fprintf(t, "%s\t%s\t%s\n", server.Name, keys, state)
		}
		return t.Flush()
	})
}

// describeEncryption says how new values are written.
func describeEncryption(s control.SecretsEncryption) string {
	switch {
	case s.Foreign != "":
		return "not managed by kedge: " + s.Foreign
	case s.Encrypted:
		return fmt.Sprintf("on, %s with %s", s.Provider, s.Key)
	}
	return "off: Secrets are plain text in the files of the datastore"
}

// stages says what is done in a stage.
var stages = map[string]string{
	"distribute": "stage 1 of 4, every server gets the new key",
	"switch":     "stage 2 of 4, every server begins to write with it",
	"rewrite":    "stage 3 of 4, Secrets are rewritten",
	"drop":       "stage 4 of 4, every server forgets the old key",
}

// describeChange says how far a change is.
func describeChange(s control.SecretsEncryption) string {
	if s.Stage == "" {
		return fmt.Sprintf("%s, ended %s after %s, %d Secrets", s.Change, s.Ended.Local().Format(time.DateTime), s.Ended.Sub(s.Began).Round(time.Millisecond), s.Total)
	}
	text := s.Change + ", " + stages[s.Stage]
	if s.Stage == "rewrite" {
		text += fmt.Sprintf(": %d of %d", s.Done, s.Total)
	}
	if s.Waits != "" {
		text += "; it waits: " + s.Waits
	}
	return text
}

// explainOldServer explains the error of a kedge that is older than this command.
func explainOldServer(err error) error {
	if errors.Is(err, control.ErrUnknownRequest) {
		return errors.New("the running kedge is older than this command and cannot change the encryption of Secrets; upgrade it")
	}
	return err
}

// followInterval is how often a command asks how far a change is.
const followInterval = 500 * time.Millisecond

// changeCommand returns the command that begins a change and waits for its end.
func changeCommand(name string, cmd cli.Command) *cli.Command {
	noWait := settings.Switch(settings.Setting{Name: "no-wait", NoVar: true, Help: "return when the change has begun; \"kedge secrets-encrypt status\" shows its progress"})
	cmd.Name = name
	cmd.Description += "\n\nA server that is away is waited for: every stage ends when all servers have confirmed it. The change goes on\n" +
		"when this command is interrupted, when a server restarts, and when another server leads."
	return leaf(cmd, rowsOf(settings.RunDir, noWait), func(c *call) error {
		runDir := settings.RunDir.In(c.values)
		if err := control.Post(c.ctx, runDir, control.ChangeSecretsEncryptionPath, url.Values{"change": {name}}, &struct{}{}); err != nil {
			return explainOldServer(err)
		}
		if noWait.In(c.values) {
			return nil
		}
		return followChange(c, runDir)
	})
}

// followChange prints how far a change of the encryption is until it has ended.
func followChange(c *call, runDir string) error {
	return follow(c, "kedge secrets-encrypt status", func() (string, bool, error) {
		var s control.SecretsEncryption
		err := control.Get(c.ctx, runDir, control.SecretsEncryptionPath, nil, &s)
		return describeChange(s), s.Stage == "", err
	})
}

// follow prints how far a change is, as ask says, until it is over. status is the command that shows it.
func follow(c *call, status string, ask func() (text string, over bool, err error)) error {
	told := ""
	for {
		text, over, err := ask()
		switch {
		case c.ctx.Err() != nil:
			return fmt.Errorf("interrupted; the change goes on, and %q shows its progress", status)
		case errors.Is(err, control.ErrNotRunning):
			return fmt.Errorf("%w; the change goes on when it runs again", err)
		case err != nil: // there may be no majority of servers for a moment
			text, over = err.Error(), false
		}
		if text != told {
			told = text
			fmt.Fprintln(c.out, text)
		}
		if over {
			return nil
		}
		select {
		case <-c.ctx.Done():
		case <-time.After(followInterval):
		}
	}
}
