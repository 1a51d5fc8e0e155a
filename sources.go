package main

import (
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/urfave/cli/v2"

	"kedge/internal/config"
)

// sources say where settings come from that are not of the command line.
type sources struct {
	files map[string]config.Value // by the flag's name
	env   map[string]string       // the variable, by the flag's name
	// tokenFile: what is wrong with the token is wrong with the file of --token-file.
	tokenFile bool
}

// configured runs action with the configuration files' values for flags that neither the
// command line nor the environment has set. What is wrong with a setting is said of the
// place where it was made.
func configured(c *cli.Context, flags []cli.Flag, action func() error) error {
	env := variables(c, flags)
	files, err := applyConfigFiles(c, flags)
	if err == nil {
		err = action()
	}
	s := sources{files: files, env: env, tokenFile: c.String("token-file") != "" && c.String("token") == ""}
	return s.locate(err)
}

// variables are those of the environment that flags have their values from. The library
// does not say whether the command line has overruled one; it has where values differ.
func variables(c *cli.Context, flags []cli.Flag) map[string]string {
	out := map[string]string{}
	for _, f := range flags {
		d, ok := f.(cli.DocGenerationFlag)
		if !ok || len(d.GetEnvVars()) == 0 {
			continue
		}
		name, variable := f.Names()[0], d.GetEnvVars()[0]
		text, set := os.LookupEnv(variable)
		if !set || !c.IsSet(name) {
			continue
		}
		var same bool
		switch f.(type) {
		case *cli.StringSliceFlag:
			same = slices.Equal(c.StringSlice(name), []string{strings.TrimSpace(text)})
		case *cli.DurationFlag:
			d, err := time.ParseDuration(text)
			same = err == nil && c.Duration(name) == d
		default:
			same = fmt.Sprint(c.Value(name)) == text
		}
		if same {
			out[name] = variable
		}
	}
	return out
}

// located is an error whose text says where the setting was made.
type located struct {
	text string
	error
}

func (l located) Error() string { return l.text }
func (l located) Unwrap() error { return l.error }

// aboutFlag is how every message begins that is about the value of a flag, or of two.
var aboutFlag = regexp.MustCompile(`^--([a-z][a-z-]*)\b(?:((?: \S+)? and )--([a-z][a-z-]*)\b)?`)

// locate puts the place of a setting before what is wrong with it: err's own text, or
// those of the errors joined in it, begin with the flag.
func (s sources) locate(err error) error {
	if err == nil {
		return nil
	}
	if many, ok := err.(interface{ Unwrap() []error }); ok {
		errs := many.Unwrap()
		if errors.Join(errs...).Error() == err.Error() {
			out := make([]error, len(errs))
			for i, e := range errs {
				out[i] = s.locate(e)
			}
			return errors.Join(out...)
		}
	}
	text := err.Error()
	m := aboutFlag.FindStringSubmatch(text)
	if m == nil {
		return err
	}
	rest := text[len(m[0]):]
	name, where := s.called(m[1], text)
	if m[3] != "" {
		second, place := s.called(m[3], text)
		name += m[2] + second
		if where == "" {
			where = place
		}
	}
	if there := where + name + rest; there != text {
		return located{there, err}
	}
	return err
}

// called is how the user knows a flag, and FILE:LINE where a file sets it. message may
// quote the item of a list that it is about.
func (s sources) called(name, message string) (as, where string) {
	if name == "token" && s.tokenFile {
		name = "token-file"
	}
	if v, ok := s.files[name]; ok {
		at := v.Source
		for i, item := range v.Items {
			if slices.ContainsFunc(append(splitList([]string{item}), item), func(part string) bool { return strings.Contains(message, fmt.Sprintf("%q", part)) }) {
				at = v.Sources[i]
				break
			}
		}
		return name, at + ": "
	}
	if v, ok := s.env[name]; ok {
		return v, ""
	}
	return "--" + name, ""
}
