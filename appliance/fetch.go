package appliance

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"

	"kedge/appliance/release"
	"kedge/internal/errorkind"
)

// DefaultReleases is the address of kedge's releases: below it are the folders of the versions, and channels/NAME with the
// name of a version.
const DefaultReleases = "https://get.kedge.io"

// Source is where the new executable of an upgrade comes from. At most one of File and URL is set.
type Source struct {
	File string // an executable on this machine
	URL  string // the folder of a release
	// Base is the address of releases, for Version. An empty Version is the newest of Channel.
	Base, Version, Channel string
	// Arch is the architecture, as Go names it; empty for this machine's.
	Arch   string
	Keys   []release.Key
	Client *http.Client
}

// DownloadClient returns the client for fetching releases. It keeps no connection open.
func DownloadClient() *http.Client {
	return &http.Client{Transport: &http.Transport{Proxy: http.ProxyFromEnvironment, TLSHandshakeTimeout: 30 * time.Second, ResponseHeaderTimeout: time.Minute, DisableKeepAlives: true}}
}

// maxRelease bounds what is fetched of one file of a release, in bytes.
const maxRelease = 1 << 30

var versionName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9.+_-]*$`)

// Take returns the path of a verified executable. What it fetches is in the folder dir, which the caller makes and removes.
// The note says what was not verified; empty if everything was.
func (s Source) Take(ctx context.Context, dir string) (path, note string, err error) {
	if s.Arch == "" {
		s.Arch = runtime.GOARCH
	}
	name := release.Executable(s.Arch)
	if s.File != "" {
		if _, err := os.Stat(s.File); err != nil {
			return "", "", errorkind.Permanent(err)
		}
		note, err = verifyFile(s.File, name, s.Keys)
		return s.File, note, err
	}
	from := strings.TrimSuffix(s.URL, "/")
	if from == "" {
		base := strings.TrimSuffix(s.Base, "/")
		if s.Version == "" {
			if s.Version, err = s.newest(ctx, base, dir); err != nil {
				return "", "", err
			}
		}
		if !versionName.MatchString(s.Version) {
			return "", "", errorkind.BadSetting("version", " %q is not the name of a version", s.Version)
		}
		from = base + "/" + s.Version
	}
	files := []string{release.ListName, release.VersionName, name}
	if len(s.Keys) > 0 {
		files = append(files, release.SignatureName)
	}
	for _, f := range files {
		if err := s.get(ctx, from+"/"+f, filepath.Join(dir, f)); err != nil {
			return "", "", err
		}
	}
	path = filepath.Join(dir, name)
	if note, err = verifyListed(dir, path, name, s.Version, s.Keys); err != nil {
		return "", "", err
	}
	return path, note, os.Chmod(path, 0o755)
}

// newest returns the version that a channel names.
func (s Source) newest(ctx context.Context, base, dir string) (string, error) {
	if !versionName.MatchString(s.Channel) {
		return "", errorkind.BadSetting("channel", " %q is not the name of a channel", s.Channel)
	}
	file := filepath.Join(dir, "channel")
	if err := s.get(ctx, base+"/channels/"+s.Channel, file); err != nil {
		return "", err
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	version, _, _ := strings.Cut(string(data), "\n")
	if !versionName.MatchString(version) {
		return "", fmt.Errorf("%s/channels/%s does not have the name of a version", base, s.Channel)
	}
	return version, nil
}

// get fetches a file over HTTPS.
func (s Source) get(ctx context.Context, from, to string) (err error) {
	u, err := url.Parse(from)
	if err != nil || u.Scheme != "https" || u.Host == "" {
		return errorkind.Permanent(fmt.Errorf("%s is not an address that begins with https://", from))
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, from, nil)
	if err != nil {
		return err
	}
	resp, err := s.Client.Do(req)
	if err != nil {
		return fmt.Errorf("%s cannot be fetched: %w", from, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("%s cannot be fetched: the server answers %s", from, resp.Status)
	}
	f, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	n, err := io.Copy(f, io.LimitReader(&stallGuard{body: resp.Body, limit: stallLimit}, maxRelease+1))
	if err == nil && n > maxRelease {
		err = fmt.Errorf("it has more than %d MiB", maxRelease>>20)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		return explain(step{path: to}, fmt.Errorf("%s cannot be fetched: %w", from, err))
	}
	return nil
}

// stallLimit is how long a download may go without a byte.
const stallLimit = time.Minute

// stallGuard ends a download that receives nothing for a while, however long it takes otherwise.
type stallGuard struct {
	body  io.ReadCloser
	limit time.Duration
}

func (s *stallGuard) Read(p []byte) (int, error) {
	t := time.AfterFunc(s.limit, func() { s.body.Close() })
	n, err := s.body.Read(p)
	if !t.Stop() && err != nil {
		err = fmt.Errorf("nothing was received for %s", s.limit)
	}
	return n, err
}

// notSigned is the note for what is taken although no key is known.
const notSigned = "this machine trusts no key of releases, so the signature is not checked"

// verifyFile verifies an executable of the user by the list of a release beside it.
func verifyFile(path, name string, keys []release.Key) (note string, err error) {
	dir := filepath.Dir(path)
	if _, err := os.Stat(filepath.Join(dir, release.ListName)); err == nil {
		return verifyListed(dir, path, name, "", keys)
	}
	if len(keys) > 0 {
		return "", errorkind.Permanent(fmt.Errorf("%s is not signed: put the files %s, %s and %s of its release beside it", path, release.ListName, release.SignatureName, release.VersionName))
	}
	return notSigned, nil
}

// verifyListed verifies an executable, which has a name in the release, by the list of the release in dir. The list must be
// that of a version unless this is empty.
func verifyListed(dir, path, name, version string, keys []release.Key) (note string, err error) {
	text, err := os.ReadFile(filepath.Join(dir, release.ListName))
	if err != nil {
		return "", err
	}
	var list *release.List
	if len(keys) > 0 {
		signature, err := os.ReadFile(filepath.Join(dir, release.SignatureName))
		if errors.Is(err, fs.ErrNotExist) {
			err = &release.MissingError{Folder: dir, Name: release.SignatureName}
		}
		if err != nil {
			return "", errorkind.Permanent(err)
		}
		list, err = release.Verify(text, signature, keys)
		if err != nil {
			return "", errorkind.Permanent(err)
		}
	} else {
		note = notSigned
		if list, err = release.Parse(text); err != nil {
			return "", errorkind.Permanent(err)
		}
	}
	if version == "" {
		data, err := os.ReadFile(filepath.Join(dir, release.VersionName))
		if err != nil {
			return "", errorkind.Permanent(err)
		}
		version = strings.TrimSuffix(string(data), "\n")
	}
	if err := list.CheckVersion(version); err != nil {
		return "", errorkind.Permanent(err)
	}
	f, err := os.Open(path)
	if err != nil {
		return "", errorkind.Permanent(err)
	}
	defer f.Close()
	if err := list.Check(name, f); err != nil {
		return "", errorkind.Permanent(err)
	}
	return note, nil
}
