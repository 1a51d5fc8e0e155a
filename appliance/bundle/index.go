package bundle

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	distribution "github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	v1 "github.com/opencontainers/image-spec/specs-go/v1"
)

// format is the version of the format of bundles. It grows when an older kedge would misunderstand a newer bundle.
const format = 1

// Limits of what is read into memory.
const (
	maxIndex     = 16 << 20
	maxSignature = 4 << 10
	maxItems     = 1 << 14
	maxConfig    = 1 << 20
)

// Index lists the contents of a bundle.
type Index struct {
	Format int    `json:"format"`
	MadeBy string `json:"madeBy"` // the version of the kedge that made it
	// Base is the ID of the bundle whose contents are not repeated; empty for a whole bundle.
	Base string `json:"base,omitempty"`
	// Head is the script before the executables, if the file does not begin with an executable.
	Head        *Part        `json:"head,omitempty"`
	Executables []Executable `json:"executables"`
	Images      []Image      `json:"images,omitempty"`
	Manifests   []Item       `json:"manifests,omitempty"` // in the order in which they are applied
	Charts      []Item       `json:"charts,omitempty"`
	Config      string       `json:"config,omitempty"` // settings in the form of a configuration file
	Contents    []Part       `json:"contents,omitempty"`
}

// Part is a stretch of the file.
type Part struct {
	SHA256 string `json:"sha256"`
	Size   int64  `json:"size"`
	// Offset is from the begin of the file; 0 for a part that only the base has, or for what is at the begin.
	Offset int64 `json:"offset"`
	// Absent means that the part is in the base, and not in the file.
	Absent bool `json:"absent,omitempty"`
}

// Executable is a launcher for one architecture of Go.
type Executable struct {
	Architecture string `json:"architecture"`
	Part
}

// Image is the name of an image. Its descriptor, and all blobs below it for the architectures of the bundle, are contents.
type Image struct {
	Name       string        `json:"name"`
	Descriptor v1.Descriptor `json:"descriptor"`
}

// Item is a file with a name. Its content is among the contents.
type Item struct {
	Name   string `json:"name"`
	SHA256 string `json:"sha256"`
}

// ID identifies what a bundle installs: it is the same for a whole bundle and for one with only what is new, and does not
// depend on how the contents lie in the file.
func (x *Index) ID() string {
	bare := *x
	bare.Base, bare.Head, bare.Contents, bare.Executables = "", nil, nil, nil
	for _, e := range x.Executables {
		bare.Executables = append(bare.Executables, Executable{e.Architecture, Part{SHA256: e.SHA256, Size: e.Size}})
	}
	for _, p := range x.Contents {
		bare.Contents = append(bare.Contents, Part{SHA256: p.SHA256, Size: p.Size})
	}
	slices.SortFunc(bare.Contents, func(a, b Part) int { return strings.Compare(a.SHA256, b.SHA256) })
	data, err := json.Marshal(bare)
	if err != nil {
		panic(err) // it consists of texts and numbers
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// Architectures returns the architectures of the executables.
func (x *Index) Architectures() (all []string) {
	for _, e := range x.Executables {
		all = append(all, e.Architecture)
	}
	return all
}

// content returns the content with a hash, or nil.
func (x *Index) content(sha string) *Part {
	if i := slices.IndexFunc(x.Contents, func(p Part) bool { return p.SHA256 == sha }); i >= 0 {
		return &x.Contents[i]
	}
	return nil
}

// parts returns everything in the file before the index, in the order of the file.
func (x *Index) parts() (all []Part) {
	if x.Head != nil {
		all = append(all, *x.Head)
	}
	for _, e := range x.Executables {
		all = append(all, e.Part)
	}
	all = append(all, x.Contents...)
	return slices.DeleteFunc(all, func(p Part) bool { return p.Absent })
}

// parseIndex reads an index that lies at an offset of its file, and checks it.
func parseIndex(data []byte, at int64) (*Index, error) {
	var version struct{ Format int }
	if err := json.Unmarshal(data, &version); err != nil {
		return nil, err
	}
	if version.Format != format {
		return nil, &NewerError{Format: version.Format}
	}
	x := &Index{}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(x); err != nil {
		return nil, err
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return nil, errors.New("something follows the index")
	}
	return x, x.check(at)
}

// check returns an error unless the index can be that of a file in which it lies at an offset.
func (x *Index) check(at int64) error {
	if n := len(x.Images) + len(x.Manifests) + len(x.Charts) + len(x.Contents) + len(x.Executables); n > maxItems {
		return fmt.Errorf("it lists %d items, and at most %d are possible", n, maxItems)
	}
	if len(x.Config) > maxConfig {
		return fmt.Errorf("its settings have more than %d bytes", maxConfig)
	}
	if err := x.checkParts(at); err != nil {
		return err
	}
	known := map[string]int64{}
	for _, p := range x.Contents {
		if _, twice := known[p.SHA256]; twice {
			return fmt.Errorf("the content %s is listed twice", p.SHA256)
		}
		known[p.SHA256] = p.Size
	}
	for _, items := range [][]Item{x.Manifests, x.Charts} {
		names := map[string]bool{}
		for _, it := range items {
			switch _, ok := known[it.SHA256]; {
			case !validName(it.Name):
				return fmt.Errorf("%q cannot be the name of a file", it.Name)
			case names[it.Name]:
				return fmt.Errorf("the file %s is listed twice", it.Name)
			case !ok:
				return fmt.Errorf("the content of %s is missing", it.Name)
			}
			names[it.Name] = true
		}
	}
	names := map[string]bool{}
	for _, img := range x.Images {
		if err := checkImage(img, known); err != nil {
			return err
		}
		if names[img.Name] {
			return fmt.Errorf("the image %s is listed twice", img.Name)
		}
		names[img.Name] = true
	}
	return nil
}

// checkParts checks that the parts fill the file up to the index.
func (x *Index) checkParts(at int64) error {
	archs := map[string]bool{}
	for _, e := range x.Executables {
		if !validName(e.Architecture) || archs[e.Architecture] {
			return fmt.Errorf("the executable for %q is not listed rightly", e.Architecture)
		}
		archs[e.Architecture] = true
		if e.Absent && x.Base == "" {
			return errors.New("an executable is missing")
		}
	}
	if len(archs) == 0 {
		return errors.New("it lists no executable")
	}
	for _, p := range x.Contents {
		if p.Absent && x.Base == "" {
			return fmt.Errorf("the content %s is missing", p.SHA256)
		}
		if !validSum(p.SHA256) || p.Size < 0 || p.Absent && p.Offset != 0 {
			return fmt.Errorf("the content %q is not listed rightly", p.SHA256)
		}
	}
	end := int64(0)
	for _, p := range x.parts() {
		if !validSum(p.SHA256) || p.Size < 0 || p.Offset != end || p.Size > at-end {
			return fmt.Errorf("the sizes that it lists are not those of the file")
		}
		end += p.Size
	}
	if end != at {
		return errors.New("the sizes that it lists are not those of the file")
	}
	return nil
}

func checkImage(img Image, known map[string]int64) error {
	name, err := distribution.ParseDockerRef(img.Name)
	if err != nil || name.String() != img.Name {
		return fmt.Errorf("%q is not the name of an image", img.Name)
	}
	d := img.Descriptor
	if d.Digest.Validate() != nil || d.Digest.Algorithm() != digest.SHA256 {
		return fmt.Errorf("the digest of the image %s is not a SHA-256", img.Name)
	}
	if size, ok := known[d.Digest.Encoded()]; !ok || size != d.Size {
		return fmt.Errorf("the content of the image %s is missing", img.Name)
	}
	return nil
}

func validSum(s string) bool {
	raw, err := hex.DecodeString(s)
	return err == nil && len(raw) == sha256.Size && strings.ToLower(s) == s
}

// validName reports whether a name can be that of a file in a folder of kedge's: it has no separator, and is neither hidden
// nor a flag.
func validName(name string) bool {
	if name == "" || len(name) > 200 || name[0] == '.' || name[0] == '-' {
		return false
	}
	for _, c := range name {
		switch {
		case c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z', c >= '0' && c <= '9', strings.ContainsRune("._+-", c):
		default:
			return false
		}
	}
	return true
}

// list writes a list of words for a message.
func list(words []string) string {
	if len(words) == 0 {
		return "nothing"
	}
	return strings.Join(words, " and ")
}
