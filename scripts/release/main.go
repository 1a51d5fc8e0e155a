// Release makes the folder of a release from executables that are built already: it lists and signs them, and adds
// install.sh, the licences and the list of the modules. scripts/release.sh calls it, for `make release`; it is no part
// of the product.
//
// Its tests run scripts/install.sh with such folders.
package main

import (
	"errors"
	"flag"
	"fmt"
	"os"
	"regexp"
	"strings"
	"time"

	"aead.dev/minisign"

	"kedge/appliance/release"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "release:", err)
		os.Exit(1)
	}
}

// build describes a release.
type build struct {
	version string
	commit  string
	date    time.Time // of the commit
	root    string    // the folder of the source, in which the executables are below bin and build
	out     string    // the folder of all releases
	arches  []string
	host    string   // the architecture whose executable has no suffix
	others  []module // libraries that are not Go modules

	secret *minisign.PrivateKey // nil for a release that is not signed
}

func run(args []string) error {
	var b build
	flags := flag.NewFlagSet("release", flag.ContinueOnError)
	flags.StringVar(&b.version, "version", "", "version of the release")
	flags.StringVar(&b.commit, "commit", "", "commit that was built")
	date := flags.String("date", "", "date of the commit, in RFC 3339")
	flags.StringVar(&b.root, "root", ".", "folder of the source, with the executables")
	flags.StringVar(&b.out, "out", "dist", "folder of releases")
	flags.StringVar(&b.host, "host", "", "architecture of bin/kedge")
	key := flags.String("sign-key", "", "file of the secret key")
	unsigned := flags.Bool("unsigned", false, "do not sign")
	library := flags.String("libraries", "", "NAME=VERSION of the C libraries that are linked, separated by spaces")
	if err := flags.Parse(args); err != nil {
		return err
	}
	b.arches = flags.Args()
	var err error
	if b.date, err = time.Parse(time.RFC3339, *date); err != nil {
		return err
	}
	for _, l := range strings.Fields(*library) {
		name, version, ok := strings.Cut(l, "=")
		if !ok || name == "" || version == "" {
			return fmt.Errorf("%q is not NAME=VERSION of a library", l)
		}
		b.others = append(b.others, module{path: name, version: version})
	}
	if (*key == "") != *unsigned {
		return errors.New("set KEDGE_SIGN_KEY to the file of the secret key, or KEDGE_UNSIGNED=1 for a release that is not signed")
	}
	if *key != "" {
		if err := mayBeSigned(b.version); err != nil {
			return err
		}
		if len(b.arches) == 0 {
			return b.mayUse(*key, release.BuiltIn())
		}
		secret, err := readSecret(*key)
		if err != nil {
			return err
		}
		b.secret = &secret
	}
	if len(b.arches) == 0 { // whether it may be made was the question
		return nil
	}
	return b.make(release.BuiltIn())
}

// tagged is the name of a tag: a released version.
var tagged = regexp.MustCompile(`^v[0-9]+\.[0-9]+\.[0-9]+(-[0-9A-Za-z.]+)?(\+[0-9A-Za-z.]+)?$`)

// between is what git describe adds to a tag for commits after it.
var between = regexp.MustCompile(`-[0-9]+-g[0-9a-f]+$`)

// mayBeSigned returns an error for a version that others could not find again.
func mayBeSigned(version string) error {
	if strings.HasSuffix(version, "-dirty") || between.MatchString(version) || !tagged.MatchString(version) {
		return fmt.Errorf("%s is not the version of a tag: only a commit with a tag such as v1.2.3, without changes in the working tree, is signed", version)
	}
	return nil
}

// channels returns the channels that a version is for: stable only without a suffix such as -rc.1.
func channels(version string) []string {
	if m := tagged.FindStringSubmatch(version); m != nil && m[1] == "" {
		return []string{"latest", "stable"}
	}
	return []string{"latest"}
}
