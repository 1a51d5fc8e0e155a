package support

import (
	"bytes"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

const hidden = "***"

// forms are texts of the form of a secret.
var forms = []struct {
	pattern *regexp.Regexp
	by      string
}{
	{regexp.MustCompile(`K1[0-9a-f]{64}::[^\s"']+`), hidden},                                // join tokens
	{regexp.MustCompile(`eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]*`), hidden}, // tokens of service accounts
	{regexp.MustCompile(`AGE-SECRET-KEY-1[0-9A-Z]+`), hidden},                               // the recovery key
	{regexp.MustCompile(`(?s)-----BEGIN [A-Z ]*PRIVATE KEY-----.*?-----END [A-Z ]*PRIVATE KEY-----`), hidden},
	{regexp.MustCompile(`(://[^/\s:@"']*):[^/\s@"']+@`), "$1:" + hidden + "@"}, // URLs with a password
	{regexp.MustCompile(`(?i)\b(authorization:\s*|bearer\s+|basic\s+)[A-Za-z0-9._~+/=-]{8,}`), "$1" + hidden},
	{regexp.MustCompile(`(?i)((?:password|passwd|secret|token|api[_-]?key|access[_-]?key)["']?\s*[=:]\s*["']?)[^\s"',;}&]{4,}`), "$1" + hidden},
}

// scrubber replaces secrets in texts.
type scrubber struct{ known [][]byte }

// newScrubber makes a scrubber for secrets that are known, and those that have the form of one.
func newScrubber(known []string) scrubber {
	var s scrubber
	for _, k := range known {
		const least = 6 // a shorter text occurs by chance
		if k = strings.TrimSpace(k); len(k) >= least {
			s.known = append(s.known, []byte(k))
		}
	}
	// The longest first: a secret may be a part of another.
	slices.SortFunc(s.known, func(a, b []byte) int { return len(b) - len(a) })
	return s
}

// binary reports whether data is compressed, such as a profile.
func binary(data []byte) bool { return bytes.HasPrefix(data, []byte{0x1f, 0x8b}) }

func (s scrubber) clean(data []byte) []byte {
	if binary(data) {
		return data
	}
	for _, k := range s.known {
		data = bytes.ReplaceAll(data, k, []byte(hidden))
	}
	for _, f := range forms {
		data = f.pattern.ReplaceAll(data, []byte(f.by))
	}
	return data
}

// knownSecrets returns the secrets of the settings and those in files of the data directory: tokens, keys, and the key of
// secrets at rest. A log that has one of them has it in the same form.
func (c Config) knownSecrets() []string {
	known := slices.Clone(c.Secrets)
	for _, s := range c.Settings {
		if !slices.Contains(shown, s.Name) && s.Place != "default" {
			for _, item := range s.Items {
				_, value, ok := strings.Cut(item, "=")
				if known = append(known, item); ok {
					known = append(known, value)
				}
			}
		}
	}
	for _, name := range []string{"server/token", "server/server-token"} {
		if data, err := os.ReadFile(filepath.Join(c.DataDir, name)); err == nil {
			known = append(known, string(data))
			for _, line := range strings.Fields(string(data)) {
				known = append(known, line)
			}
		}
	}
	if data, err := os.ReadFile(filepath.Join(c.DataDir, "server/encryption-config.yaml")); err == nil {
		for _, m := range regexp.MustCompile(`secret:\s*"?([^\s"]+)`).FindAllSubmatch(data, -1) {
			known = append(known, string(m[1]))
		}
	}
	_ = filepath.WalkDir(filepath.Join(c.DataDir, "server/tls"), func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type().IsRegular() && strings.HasSuffix(path, ".key") {
			if data, err := os.ReadFile(path); err == nil {
				for line := range strings.Lines(string(data)) { // a line of base64 is enough to tell
					if !strings.HasPrefix(line, "-----") {
						known = append(known, line)
					}
				}
			}
		}
		return nil
	})
	if c.Kubeconfig != "" {
		if data, err := os.ReadFile(c.Kubeconfig); err == nil {
			for _, m := range regexp.MustCompile(`(?:client-key-data|token|password):\s*"?([^\s"]+)`).FindAllSubmatch(data, -1) {
				known = append(known, string(m[1]))
			}
		}
	}
	return known
}
