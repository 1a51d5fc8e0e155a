package main

import (
	"bytes"
	"cmp"
	"debug/buildinfo"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/CycloneDX/cyclonedx-go"
	"github.com/google/uuid"

	"kedge/scripts/licences/modules"
)

// module is a Go module in the executable, or another library with an empty sum and dir.
type module struct {
	path, version string
	sum           string // as in go.sum; empty for Go's standard library
	licence       string // SPDX name
	files         []modules.File
}

// standardLibrary is the name that databases of vulnerabilities have for Go's standard library.
const standardLibrary = "std"

// modules returns the modules that the linker has recorded in the programs, and the other libraries, sorted.
func (b *build) modules() ([]module, error) {
	found := map[string]module{}
	add := func(m *debug.Module) {
		if m.Replace != nil {
			m = &debug.Module{Path: m.Path, Version: m.Replace.Version, Sum: m.Replace.Sum}
		}
		found[m.Path+"@"+m.Version] = module{path: m.Path, version: m.Version, sum: m.Sum}
	}
	for _, arch := range b.arches {
		for _, program := range b.programs(arch) {
			info, err := buildinfo.ReadFile(program)
			if err != nil {
				return nil, err
			}
			if err := reproducible(info, arch); err != nil {
				return nil, fmt.Errorf("%s: %w", program, err)
			}
			if info.Main.Path != "kedge" { // runc, from its module
				add(&info.Main)
			}
			for _, m := range info.Deps {
				add(m)
			}
			add(&debug.Module{Path: standardLibrary, Version: strings.TrimPrefix(info.GoVersion, "go")})
		}
	}
	if err := licencesOf(found); err != nil {
		return nil, err
	}
	for _, m := range b.others {
		m.licence = "LGPL-2.1-or-later"
		if m.path == "libseccomp" {
			m.licence = "LGPL-2.1-only"
		}
		text, err := os.ReadFile("/usr/share/common-licenses/LGPL-2.1")
		if err != nil {
			return nil, err
		}
		m.files = []modules.File{{Name: "LGPL-2.1", Text: text}}
		found[m.path] = m
	}
	var all []module
	for _, m := range found {
		all = append(all, m)
	}
	slices.SortFunc(all, func(a, b module) int {
		return cmp.Or(strings.Compare(a.path, b.path), strings.Compare(a.version, b.version))
	})
	return all, nil
}

// reproducible returns an error if a program was built in a way that others would not build it.
func reproducible(info *debug.BuildInfo, arch string) error {
	want := map[string]string{"-trimpath": "true", "GOARCH": arch}
	switch arch {
	case "amd64":
		want["GOAMD64"] = "v1"
	case "arm64":
		want["GOARM64"] = "v8.0"
	}
	for _, s := range info.Settings {
		if strings.HasPrefix(s.Key, "vcs") {
			return errors.New("it was built with -buildvcs, which makes the same source in another repository another program")
		}
		if strings.HasPrefix(s.Key, "CGO_") && strings.HasSuffix(s.Key, "FLAGS") && strings.Contains(s.Value, "/") {
			return fmt.Errorf("it was built with %s=%s, a path of this machine", s.Key, s.Value)
		}
		if v, ok := want[s.Key]; ok && v != s.Value {
			return fmt.Errorf("it was built with %s=%s in place of %s", s.Key, s.Value, v)
		}
		delete(want, s.Key)
	}
	for key, value := range want {
		return fmt.Errorf("it was built without %s=%s", key, value)
	}
	return nil
}

// licencesOf sets the licences, from the modules' files.
func licencesOf(found map[string]module) error {
	args := []string{"list", "-m", "-json"}
	for _, m := range found {
		if m.path != standardLibrary {
			args = append(args, m.path)
		}
	}
	cmd := exec.Command("go", args...)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("go list: %w", err)
	}
	dirs := map[string]string{}
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var m struct {
			Path, Version, Dir string
			Replace            *struct{ Version, Dir string }
		}
		if err := dec.Decode(&m); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return fmt.Errorf("go list: %w", err)
		}
		if m.Replace != nil {
			m.Version, m.Dir = m.Replace.Version, m.Replace.Dir
		}
		dirs[m.Path+"@"+m.Version] = m.Dir
	}
	goroot, err := exec.Command("go", "env", "GOROOT").Output()
	if err != nil {
		return fmt.Errorf("go env: %w", err)
	}
	for id, m := range found {
		dir := dirs[id]
		if m.path == standardLibrary {
			dir = strings.TrimSpace(string(goroot))
		}
		if dir == "" {
			return fmt.Errorf("the program was built with %s, and go.mod has another version: build it again", id)
		}
		if m.licence, m.files, err = modules.Licence(dir); err != nil {
			return fmt.Errorf("%s: %w", id, err)
		}
		found[id] = m
	}
	return nil
}

// purl is the name of a module in lists of software of all kinds.
func (m module) purl() string {
	if m.sum == "" && m.path != standardLibrary {
		return "pkg:generic/" + m.path + "@" + m.version
	}
	return "pkg:golang/" + m.path + "@" + strings.ReplaceAll(m.version, "+", "%2B")
}

// bom returns the list of modules in the format of CycloneDX.
func (b *build) bom(all []module) ([]byte, error) {
	bom := cyclonedx.NewBOM()
	bom.SerialNumber = uuid.NewSHA1(uuid.NameSpaceOID, []byte("kedge "+b.version+" "+b.commit)).URN()
	self := cyclonedx.Component{
		BOMRef: "kedge", Type: cyclonedx.ComponentTypeApplication, Name: "kedge", Version: b.version,
		Licenses:   &cyclonedx.Licenses{{License: &cyclonedx.License{ID: "Apache-2.0"}}},
		Properties: &[]cyclonedx.Property{{Name: "commit", Value: b.commit}},
	}
	bom.Metadata = &cyclonedx.Metadata{Timestamp: b.date.UTC().Format("2006-01-02T15:04:05Z"), Component: &self}
	var components []cyclonedx.Component
	var refs []string
	for _, m := range all {
		c := cyclonedx.Component{
			BOMRef: m.purl(), Type: cyclonedx.ComponentTypeLibrary, Name: m.path, Version: m.version, PackageURL: m.purl(), Scope: cyclonedx.ScopeRequired,
			Licenses: &cyclonedx.Licenses{{License: &cyclonedx.License{ID: m.licence}}},
		}
		if sum, ok := strings.CutPrefix(m.sum, "h1:"); ok {
			raw, err := base64.StdEncoding.DecodeString(sum)
			if err != nil {
				return nil, fmt.Errorf("%s: the hash %s is malformed", m.path, m.sum)
			}
			c.Hashes = &[]cyclonedx.Hash{{Algorithm: cyclonedx.HashAlgoSHA256, Value: hex.EncodeToString(raw)}}
		}
		components = append(components, c)
		refs = append(refs, c.BOMRef)
	}
	bom.Components = &components
	bom.Dependencies = &[]cyclonedx.Dependency{{Ref: self.BOMRef, Dependencies: &refs}}
	var out bytes.Buffer
	err := cyclonedx.NewBOMEncoder(&out, cyclonedx.BOMFileFormatJSON).SetPretty(true).EncodeVersion(bom, cyclonedx.SpecVersion1_6)
	return out.Bytes(), err
}
