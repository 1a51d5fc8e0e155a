package main

import (
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// referenceCommand prints docs/reference: `make reference` writes it, and a test
// compares it, so that page and program cannot differ.
func referenceCommand() *cli.Command {
	return &cli.Command{
		Name:      "reference",
		Usage:     "Print the reference of commands or configuration in Markdown",
		ArgsUsage: "commands|configuration",
		Hidden:    true,
		Action: func(c *cli.Context) error {
			switch c.Args().First() {
			case "commands":
				printCommands(c.App.Writer, c.App)
			case "configuration":
				printConfiguration(c.App.Writer)
			default:
				return fmt.Errorf("reference of %q: want commands or configuration", c.Args().First())
			}
			return nil
		},
	}
}

func printCommands(w io.Writer, app *cli.App) {
	fmt.Fprint(w, "# Commands\n\nMade by `make reference` from the program itself; edit the source, not this page.\n")
	for _, cmd := range app.Commands {
		if !cmd.Hidden && cmd.Name != "help" {
			printCommand(w, "kedge", cmd)
		}
	}
}

func printCommand(w io.Writer, parent string, cmd *cli.Command) {
	name := parent + " " + cmd.Name
	fmt.Fprintf(w, "\n## %s\n\n%s.\n", name, cmd.Usage)
	if cmd.Description != "" {
		fmt.Fprintf(w, "\n%s\n", cmd.Description)
	}
	if cmd.ArgsUsage != "" {
		fmt.Fprintf(w, "\n    %s %s\n", name, cmd.ArgsUsage)
	}
	own := cmd.Flags
	if slices.ContainsFunc(own, func(f cli.Flag) bool { return f.Names()[0] == "config" }) {
		fmt.Fprint(w, "\nTakes the settings of the [configuration](configuration.md).\n")
		own = slices.DeleteFunc(slices.Clone(own), isServerFlag)
	}
	printFlags(w, own)
	for _, sub := range cmd.Subcommands {
		if sub.Name != "help" {
			printCommand(w, name, sub)
		}
	}
}

// isServerFlag reports whether the page of the configuration describes the flag.
func isServerFlag(f cli.Flag) bool {
	usage := func(f cli.Flag) string { return f.(cli.DocGenerationFlag).GetUsage() }
	return slices.ContainsFunc(serverFlags(), func(s cli.Flag) bool { return s.Names()[0] == f.Names()[0] && usage(s) == usage(f) })
}

func printConfiguration(w io.Writer) {
	fmt.Fprint(w, `# Configuration

Made by `+"`make reference`"+` from the program itself; edit the source, not this page.

A setting is, in the order of precedence, a flag of `+"`kedge server`"+`, an environment variable, or a key in
`+"`"+defaultConfigFile+"`"+` and then in `+"`"+defaultConfigFile+`.d/*.yaml`+"`"+`, in the order of their names:

`+"```yaml"+`
node-name: edge-1
node-label: [zone=a, disk=ssd]
kubelet-arg:
- max-pods=20
`+"```"+`

A later file replaces what an earlier one said; a key with a plus sign (`+"`kubelet-arg+`"+`) appends to it.
Flags that can be repeated take a list. In an environment variable they have one value; where no
item can contain a comma (addresses, ranges, labels, names), commas separate several.
An unknown key or a malformed value is an error that names file and line, or the variable.
`)
	category := ""
	for _, f := range serverFlags() {
		if c, ok := f.(cli.CategorizableFlag); ok && c.GetCategory() != category {
			category = c.GetCategory()
			fmt.Fprintf(w, "\n## %s\n\n| flag and key | environment | default | what it does |\n|---|---|---|---|\n", category)
		}
		d := f.(cli.DocGenerationFlag)
		_, usage := placeholder(d.GetUsage())
		name := "`" + f.Names()[0] + "`"
		for _, short := range f.Names()[1:] {
			name += ", `-" + short + "`"
		}
		fmt.Fprintf(w, "| %s | `%s` | %s | %s |\n", name, strings.Join(d.GetEnvVars(), ", "), defaultOf(d), strings.ReplaceAll(usage, "|", "\\|"))
	}
}

func printFlags(w io.Writer, flags []cli.Flag) {
	var rows []string
	for _, f := range flags {
		if f.Names()[0] == "help" {
			continue
		}
		d := f.(cli.DocGenerationFlag)
		_, usage := placeholder(d.GetUsage())
		var names []string
		for _, n := range f.Names() {
			dashes := "--"
			if len(n) == 1 {
				dashes = "-"
			}
			names = append(names, "`"+dashes+n+"`")
		}
		rows = append(rows, fmt.Sprintf("| %s | %s | %s |\n", strings.Join(names, ", "), defaultOf(d), usage))
	}
	if len(rows) > 0 {
		fmt.Fprintf(w, "\n| flag | default | what it does |\n|---|---|---|\n%s", strings.Join(rows, ""))
	}
}

// placeholder splits a flag's usage into the name of its value, which is in
// backquotes, and the text without them.
func placeholder(usage string) (value, text string) {
	if before, rest, ok := strings.Cut(usage, "`"); ok {
		if name, after, ok := strings.Cut(rest, "`"); ok {
			return name, before + name + after
		}
	}
	return "", usage
}

func defaultOf(d cli.DocGenerationFlag) string {
	v := d.GetValue()
	switch {
	case !d.TakesValue():
		return "off"
	case v == "" || v == "[]":
		return ""
	}
	return "`" + v + "`"
}
