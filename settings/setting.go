package settings

import (
	"strings"

	"kedge/internal/joining"
)

// Category groups settings in help and reference.
type Category string

// The categories.
const (
	General   Category = "General"
	Node      Category = "Node"
	Joining   Category = "Joining"
	Network   Category = "Network"
	API       Category = "API"
	Datastore Category = "External datastore"
	Upstream  Category = "Upstream components"
	Throwaway Category = "Cluster"
	Snapshots Category = "Snapshots"

	Installation Category = "Installation"
)

// Role is a set of roles that have a setting.
type Role int

// Roles.
const (
	Server Role = 1 << iota
	Agent
	Both = Server | Agent
)

// Setting is a row of the table without the type of its value.
type Setting struct {
	Name     string // name of the flag, and of the key in configuration files
	Short    string // one letter, the same as k3s's; empty if there is none
	Category Category
	Roles    Role
	Default  string
	Help     string          // with the name of the value in backquotes
	HelpFor  map[Role]string // help for roles with a different text
	NoKey    bool            // configuration files cannot set it
	NoVar    bool            // environment variables cannot set it
	File     string          // the setting whose value is the path of a file with this setting's value

	kind   kind
	splits bool // of a list: commas separate items
	read   func(row *Setting, items []string) (value any, errs []error)
	shared *shared // nil if the nodes of one cluster may differ
}

// kind is the form of a value on the command line.
type kind int

const (
	single kind = iota
	toggle      // a flag without a value means true
	list
)

// Variable returns the name of the setting's environment variable.
func (s *Setting) Variable() string {
	return "KEDGE_" + strings.ToUpper(strings.ReplaceAll(s.Name, "-", "_"))
}

// Names returns the name and the short name.
func (s *Setting) Names() []string {
	if s.Short == "" {
		return []string{s.Name}
	}
	return []string{s.Name, s.Short}
}

// TakesValue reports whether a value must follow the flag.
func (s *Setting) TakesValue() bool { return s.kind != toggle }

// IsList reports whether the setting can be given several times.
func (s *Setting) IsList() bool { return s.kind == list }

// help returns the help for a role.
func (s *Setting) help(r Role) string {
	if text, ok := s.HelpFor[r]; ok {
		return text
	}
	return s.Help
}

// Of is a setting whose value is a T.
type Of[T any] struct{ *Setting }

// In returns the value in v, or the zero value if it was invalid, which [Resolve] has reported.
func (s Of[T]) In(v Values) T {
	value, _ := v.parsed[s.Name].(T)
	return value
}

// Row returns the setting without the type of its value.
func (s Of[T]) Row() *Setting { return s.Setting }

// IsSet reports whether the user has set it.
func (s Of[T]) IsSet(v Values) bool { return v.IsSet(s.Name) }

// shared stores the value of a setting that is equal on all nodes of a cluster in the cluster's settings.
type shared struct {
	put  func(c *joining.Cluster, value any)
	show func(c joining.Cluster) any // the value for messages; nil if it is too long to show
}
