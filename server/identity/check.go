package identity

import (
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"

	"kedge/internal/atomicfile"
	"kedge/internal/errorkind"
	"kedge/internal/pki"
)

// ErrLost is wrapped in the error if an essential credential of the cluster is missing or was replaced: with
// new authorities all clients would be refused, with a new signing key all service accounts, and with a new
// encryption key Secrets could not be read.
var ErrLost = errors.New("the cluster's credentials are not whole")

// knownFile has the fingerprints of the essential credentials, so that a file of another cluster is detected.
const knownFile = "known.json"

// fingerprints are hashes of public keys and of encryption keys, by the path of their file below the server's
// directory. The file of encryption keys has one hash per key.
type fingerprints map[string][]string

// check checks the essential credentials of the cluster without writing anything.
func check(cfg Config, now time.Time) error {
	found, missing, err := readFingerprints(cfg, now)
	if err != nil {
		return err
	}
	if !cfg.Established {
		return nil
	}
	if len(missing) > 0 {
		return lostError(cfg, fmt.Sprintf("%s: missing, but needed for this server's datastore", strings.Join(missing, ", ")))
	}
	known, err := readKnown(cfg.Dir)
	if err != nil {
		return err
	}
	var others []string
	for _, name := range slices.Sorted(maps.Keys(known)) {
		if !slices.ContainsFunc(found[name], func(f string) bool { return slices.Contains(known[name], f) }) {
			others = append(others, filepath.Join(cfg.Dir, name))
		}
	}
	if len(others) > 0 && len(others) == len(known) {
		return errorkind.Permanent(fmt.Errorf("%w: %s and the files beside it are of different clusters; remove it if it is a copy of another's",
			ErrLost, filepath.Join(cfg.Dir, knownFile)))
	}
	if len(others) > 0 {
		return lostError(cfg, strings.Join(others, ", ")+" was replaced")
	}
	return nil
}

func lostError(cfg Config, what string) error {
	remedy := "restore it from a backup, or copy it from another server of the cluster, where it is the same"
	if strings.Contains(what, servingKubelet) { // which is this server's own
		remedy = "restore it from a backup, or remove this server from the cluster and join it again with an empty data directory"
	}
	if strings.HasSuffix(what, "was replaced") {
		remedy += "; if this was intended, remove " + filepath.Join(cfg.Dir, knownFile)
	}
	return errorkind.Permanent(fmt.Errorf("%w: %s; %s", ErrLost, what, remedy))
}

// readFingerprints returns the fingerprints of the existing files, and the paths of the missing files. A file that cannot
// be read is an error.
func readFingerprints(cfg Config, now time.Time) (found fingerprints, missing []string, err error) {
	found = fingerprints{}
	absent := func(path string) bool {
		_, err := os.Stat(path)
		return errors.Is(err, fs.ErrNotExist)
	}
	for _, name := range authorities {
		base := filepath.Join(cfg.tlsDir(), name)
		noKey, noCert := absent(base+".key"), absent(base+".crt")
		if noKey {
			missing = append(missing, base+".key")
		}
		if noCert {
			missing = append(missing, base+".crt")
		}
		if noKey || noCert {
			continue
		}
		ca, err := pki.LoadAuthority(cfg.tlsDir(), name, now)
		if err != nil && !cfg.Established { // an administrator has put it there
			return nil, nil, errorkind.Permanent(fmt.Errorf("an authority of the new cluster cannot be used: %w", err))
		}
		if err != nil {
			return nil, nil, errorkind.Permanent(fmt.Errorf("%w: %w", ErrLost, err))
		}
		found[filepath.Join("tls", name+".crt")] = []string{ca.Hash()}
	}
	path := filepath.Join(cfg.tlsDir(), serviceAccountKey)
	if absent(path) {
		missing = append(missing, path)
	} else {
		keys, err := pki.LoadSigningKeys(path)
		if err != nil && !cfg.Established { // an administrator has put it there
			return nil, nil, errorkind.Permanent(fmt.Errorf("the key of service accounts' tokens cannot be used: %w", err))
		}
		if err != nil {
			return nil, nil, errorkind.Permanent(fmt.Errorf("%w: %w", ErrLost, err))
		}
		if found[accountKeysName], err = accountKeyPrints(keys); err != nil {
			return nil, nil, err
		}
	}
	// The node's key belongs to this server only. It exists before the datastore, and another server knows its
	// fingerprint.
	if path = NodeKeyFile(cfg.Dir); absent(path) {
		missing = append(missing, path)
	} else {
		key, err := pki.LoadKey(path)
		if err != nil {
			return nil, nil, errorkind.Permanent(fmt.Errorf("%w: %w", ErrLost, err))
		}
		print, err := fingerprint(&key.PublicKey)
		if err != nil {
			return nil, nil, err
		}
		found[filepath.Join("tls", filepath.Base(path))] = []string{print}
	}
	path = filepath.Join(cfg.Dir, encryptionConfig)
	if absent(path) {
		return found, append(missing, path), nil
	}
	keys, err := encryptionKeys(path)
	if err != nil {
		return nil, nil, errorkind.Permanent(fmt.Errorf("%w: %w; restore it from a backup", ErrLost, err))
	}
	if len(keys) > 0 { // an administrator's own file may refer to a KMS
		found[encryptionConfig] = keys
	}
	return found, missing, nil
}

// accountKeyPrints returns the fingerprints of keys of service accounts' tokens.
func accountKeyPrints(keys []pki.SigningKey) (prints []string, err error) {
	for _, k := range keys {
		print, err := fingerprint(k.Public())
		if err != nil {
			return nil, err
		}
		prints = append(prints, print)
	}
	slices.Sort(prints)
	return prints, nil
}

func fingerprint(key crypto.PublicKey) (string, error) {
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(der)
	return hex.EncodeToString(sum[:]), nil
}

// encryptionKeys returns the fingerprints of the keys for secrets at rest. During a rotation the file has the
// old and the new key, so at least one of them is always known.
func encryptionKeys(path string) ([]string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	return keysIn(data, path)
}

// keysIn is encryptionKeys of the content of the file at path.
func keysIn(data []byte, path string) ([]string, error) {
	var c struct {
		Kind      string `json:"kind"`
		Resources []struct {
			Providers []map[string]*struct {
				Keys []struct {
					Name   string `json:"name"`
					Secret string `json:"secret"`
				} `json:"keys"`
			} `json:"providers"`
		} `json:"resources"`
	}
	if err := yaml.Unmarshal(data, &c); err != nil {
		return nil, fmt.Errorf("%s cannot be read: %w", path, err)
	}
	if c.Kind != "EncryptionConfiguration" || len(c.Resources) == 0 {
		return nil, fmt.Errorf("%s is not an EncryptionConfiguration", path)
	}
	var prints []string
	for _, r := range c.Resources {
		for _, p := range r.Providers {
			for _, provider := range p {
				if provider == nil {
					continue
				}
				for _, k := range provider.Keys {
					prints = append(prints, EncryptionKeyPrint(k.Name, k.Secret))
				}
			}
		}
	}
	return prints, nil
}

// EncryptionKeyPrint returns the fingerprint of a key of Secrets at rest. Its secret, in base64, is random, so that the
// fingerprint reveals nothing of it.
func EncryptionKeyPrint(name, secret string) string {
	sum := sha256.Sum256([]byte(name + " " + secret))
	return hex.EncodeToString(sum[:])
}

// ReplaceEncryption replaces the configuration of the keys of Secrets in dir, the server's directory, of a running server. A
// start after a crash at any point accepts the old file or the new one, whichever is there: the fingerprints of both are known
// before the file changes, and only those of the new one after it.
func ReplaceEncryption(dir string, content []byte) error {
	path := EncryptionConfigFile(dir)
	before, err := encryptionKeys(path)
	if err != nil {
		return err
	}
	after, err := keysIn(content, path)
	if err != nil {
		return err
	}
	both := slices.Concat(before, after)
	if len(before) == 0 || len(after) == 0 {
		both = nil // a file without keys has no fingerprint: nothing is known until the new one is there
	}
	return replaceKeys(dir, encryptionConfig, content, both, after)
}

// ReplaceAccountKeys is [ReplaceEncryption] for the keys of service accounts' tokens.
func ReplaceAccountKeys(dir string, keys []pki.SigningKey) error {
	had, err := pki.LoadSigningKeys(AccountKeysFile(dir))
	if err != nil {
		return err
	}
	before, err := accountKeyPrints(had)
	if err != nil {
		return err
	}
	after, err := accountKeyPrints(keys)
	if err != nil {
		return err
	}
	content, err := pki.EncodeSigningKeys(keys)
	if err != nil {
		return err
	}
	return replaceKeys(dir, accountKeysName, content, slices.Concat(before, after), after)
}

// replaceKeys replaces a file with keys below dir, while the fingerprints of the old keys and the new ones are known.
func replaceKeys(dir, name string, content []byte, both, after []string) error {
	if err := rememberKeys(dir, name, both); err != nil {
		return fmt.Errorf("note the keys in %s: %w", name, err)
	}
	if err := atomicfile.Write(filepath.Join(dir, name), content, 0o600); err != nil {
		return err
	}
	if err := rememberKeys(dir, name, after); err != nil {
		return fmt.Errorf("note the keys in %s: %w", name, err)
	}
	return nil
}

// rememberKeys replaces the fingerprints of the keys in a file; none: whichever file is there at the next start is accepted.
// Without a good file of fingerprints it does nothing: the next start writes it.
func rememberKeys(dir, name string, prints []string) error {
	// Keys of two kinds can be replaced at the same time, and have their fingerprints in one file.
	lock, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", dir, err)
	}
	all, err := readKnown(dir)
	if err != nil || all == nil {
		return err
	}
	delete(all, name)
	if len(prints) > 0 {
		prints = slices.Clone(prints)
		slices.Sort(prints)
		all[name] = slices.Compact(prints)
	}
	return writeKnown(dir, all)
}

// known is the content of the file with the fingerprints.
type known struct {
	Fingerprints fingerprints `json:"fingerprints"`
	Sum          string       `json:"sum"` // checksum: a flipped bit in a fingerprint must not make a valid key invalid
}

func (f fingerprints) sum() string {
	data, err := json.Marshal(f) // the keys of maps are sorted
	if err != nil {
		panic(err) // the type can always be marshalled
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:8])
}

// readKnown returns the fingerprints of an earlier start, or nil if there are none or the file is damaged.
func readKnown(dir string) (fingerprints, error) {
	data, err := os.ReadFile(filepath.Join(dir, knownFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var k known
	if json.Unmarshal(data, &k) != nil || k.Sum != k.Fingerprints.sum() {
		return nil, nil
	}
	return k.Fingerprints, nil
}

// Forget removes the fingerprints, so that the next [Prepare] accepts the files as they are: the server in dir
// is about to join another cluster.
func Forget(dir string) error {
	err := os.Remove(filepath.Join(dir, knownFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// remember writes the fingerprints of the existing files.
func remember(cfg Config, now time.Time) error {
	found, _, err := readFingerprints(cfg, now)
	if err != nil {
		return err
	}
	return writeKnown(cfg.Dir, found)
}

func writeKnown(dir string, f fingerprints) error {
	data, err := json.MarshalIndent(known{f, f.sum()}, "", "  ")
	if err != nil {
		return err
	}
	_, err = atomicfile.WriteIfChanged(filepath.Join(dir, knownFile), append(data, '\n'), 0o600)
	return err
}
