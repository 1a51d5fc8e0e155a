package command

import (
	"fmt"
	"slices"
	"strings"

	"github.com/urfave/cli/v2"
)

// completions has the shells' scripts. They call the executable, so that they are always up to date.
var completions = map[string]string{
	"bash": `_kedge() {
  local cur="${COMP_WORDS[COMP_CWORD]}"
  if [[ "${COMP_WORDS[1]}" == kubectl ]]; then
    local out; out=$("${COMP_WORDS[0]}" kubectl __completeNoDesc "${COMP_WORDS[@]:2:COMP_CWORD-2}" "$cur" 2>/dev/null | sed '$d')
    COMPREPLY=($(compgen -W "$out" -- "$cur")); return
  fi
  local out
  if [[ "$cur" == -* ]]; then
    out=$("${COMP_WORDS[@]:0:COMP_CWORD}" "$cur" --generate-bash-completion 2>/dev/null)
  else
    out=$("${COMP_WORDS[@]:0:COMP_CWORD}" --generate-bash-completion 2>/dev/null)
  fi
  COMPREPLY=($(compgen -W "$out" -- "$cur"))
}
complete -o default -F _kedge kedge
`,
	"zsh": `#compdef kedge
_kedge() {
  local -a opts
  if [[ "${words[2]}" == kubectl ]]; then
    opts=("${(@f)$(${words[1]} kubectl __completeNoDesc ${words[3,CURRENT]} 2>/dev/null | sed '$d')}")
  elif [[ "${words[CURRENT]}" == -* ]]; then
    opts=("${(@f)$(${words[1,CURRENT]} --generate-bash-completion 2>/dev/null)}")
  else
    opts=("${(@f)$(${words[1,CURRENT-1]} --generate-bash-completion 2>/dev/null)}")
  fi
  compadd -- "${opts[@]}"
}
# From a folder of fpath the first completion runs this file; else it is sourced.
if [[ "${funcstack[1]}" == _kedge ]]; then _kedge "$@"; else compdef _kedge kedge; fi
`,
	"fish": `function __kedge_complete
  set -l words (commandline -opc)
  set -l cur (commandline -ct)
  if test (count $words) -gt 1; and test $words[2] = kubectl
    $words[1] kubectl __completeNoDesc $words[3..-1] "$cur" 2>/dev/null | string match -v ':*'
  else if string match -q -- '-*' "$cur"
    $words "$cur" --generate-bash-completion 2>/dev/null
  else
    $words --generate-bash-completion 2>/dev/null
  end
end
complete -c kedge -f -a '(__kedge_complete)'
`,
}

const completionFlag = "--generate-bash-completion"

// completeFlag prints the flags that begin with the last word, if that is the start of a flag and the shell
// requests completions. The library only completes commands, and panics for flags.
func completeFlag(app *cli.App, args []string) bool {
	if len(args) < 3 || args[len(args)-1] != completionFlag {
		return false
	}
	begun, ok := strings.CutPrefix(args[len(args)-2], "-")
	if !ok {
		return false
	}
	begun = strings.TrimPrefix(begun, "-")
	commands, flags := app.Commands, app.Flags
	for _, word := range args[1 : len(args)-2] {
		i := slices.IndexFunc(commands, func(c *cli.Command) bool { return c.HasName(word) })
		if i >= 0 {
			commands, flags = commands[i].Subcommands, commands[i].Flags
		}
	}
	for _, f := range append(flags, cli.HelpFlag) {
		if name := f.Names()[0]; strings.HasPrefix(name, begun) {
			fmt.Fprintln(app.Writer, "--"+name)
		}
	}
	return true
}

func completionCommand() *cli.Command {
	return &cli.Command{
		Name:      "completion",
		Usage:     "Print a script that completes commands and flags in bash, zsh or fish",
		ArgsUsage: "bash|zsh|fish",
		Action: func(c *cli.Context) error {
			script, ok := completions[c.Args().First()]
			if !ok || c.NArg() > 1 {
				return badUsage("completion for %q: want bash, zsh or fish", strings.Join(c.Args().Slice(), " "))
			}
			_, err := fmt.Fprint(c.App.Writer, script)
			return err
		},
	}
}
