package kubeconfigs

import (
	"errors"
	"fmt"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"

	"kedge/internal/errorkind"
)

// Limits of kubeconfigs.
const (
	DefaultTTL = 365 * 24 * time.Hour
	MaxTTL     = 5 * 365 * 24 * time.Hour
	minTTL     = time.Minute
	maxGroups  = 32
)

// ErrReserved is wrapped if a user or a group would be mistaken for a part of the cluster.
var ErrReserved = errors.New("it is reserved for the cluster")

// Administrators is the group that may do everything, whatever the roles in the cluster say. It is the only one of
// Kubernetes' own groups that a kubeconfig may have: its members cannot be limited by roles, but they can be revoked.
const Administrators = "system:masters"

// reservedPrefix is that of the users and groups of Kubernetes and kedge: nodes, controllers, service accounts.
const reservedPrefix = "system:"

// kubeletClient is the one user of the control plane without the prefix: the API server as a client of kubelets.
const kubeletClient = "kube-apiserver-kubelet-client"

// Spec is what a kubeconfig is to be.
type Spec struct {
	User      string
	Groups    []string
	TTL       time.Duration
	Namespace string // of commands without one; empty: "default"
	Server    string // URL of the API; empty: of the server that signs
}

// names are the users and groups that kubeconfigs may have: nothing in them needs quoting in a shell or in YAML.
var names = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9._@:+/-]{0,62}[A-Za-z0-9])?$`)

const wantedName = "want at most 64 letters, digits and characters of .-_@:+/, with a letter or digit at both ends"

// Validate returns all mistakes, joined.
func (s Spec) Validate() error {
	var errs []error
	if err := ValidUser(s.User); err != nil {
		errs = append(errs, errorkind.BadUsage(err))
	}
	for i, g := range s.Groups {
		switch {
		case !names.MatchString(g):
			errs = append(errs, errorkind.BadItem("group", g, " %.80q cannot be the name of a group; %s", g, wantedName))
		case strings.HasPrefix(g, reservedPrefix) && g != Administrators:
			errs = append(errs, errorkind.BadItem("group", g, " %q: %w; of the groups that begin with %q only %s can be given", g, ErrReserved, reservedPrefix, Administrators))
		case slices.Contains(s.Groups[:i], g):
			errs = append(errs, errorkind.BadItem("group", g, " %q is given twice", g))
		}
	}
	if len(s.Groups) > maxGroups {
		errs = append(errs, errorkind.BadSetting("group", " is given %d times; a kubeconfig has at most %d groups", len(s.Groups), maxGroups))
	}
	if s.TTL < minTTL || s.TTL > MaxTTL {
		errs = append(errs, errorkind.BadSetting("ttl", " %s is not between %s and %s", s.TTL, minTTL, MaxTTL))
	}
	if s.Namespace != "" && len(validation.IsDNS1123Label(s.Namespace)) > 0 {
		errs = append(errs, errorkind.BadSetting("namespace", " %.80q cannot be the name of a namespace; want at most 63 small letters, digits and dashes, with a letter or digit at both ends", s.Namespace))
	}
	if s.Server != "" {
		errs = append(errs, validServer(s.Server))
	}
	return errors.Join(errs...)
}

// ValidUser returns why a kubeconfig cannot be for the user, or nil.
func ValidUser(user string) error {
	switch {
	case !names.MatchString(user):
		return fmt.Errorf("%.80q cannot be the name of a user; %s", user, wantedName)
	case strings.HasPrefix(user, reservedPrefix) || user == kubeletClient:
		return fmt.Errorf("%q cannot be the name of a user: %w; choose a name that does not begin with %q", user, ErrReserved, reservedPrefix)
	}
	return nil
}

func validServer(text string) error {
	u, err := url.Parse(text)
	if err != nil || u.Scheme != "https" || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return errorkind.BadSetting("server", " %.200q is not a URL such as https://HOST:6443", text)
	}
	return nil
}
