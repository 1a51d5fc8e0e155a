package joining

// Role is what a machine joins as.
type Role string

// The roles. A server has a node too, unless that is disabled. A witness has a member of the datastore and nothing else.
const (
	Agent   Role = "agent"
	Server  Role = "server"
	Witness Role = "witness"
)

// WitnessGroup is the organization in the certificate of a witness's datastore. That of a server has none: servers answer each
// other more than they answer a witness, whatever the datastore says about its members.
const WitnessGroup = "kedge:witnesses"

// Roles are all roles.
var Roles = []Role{Agent, Server, Witness}

// Command is the command with which a machine with the role starts, without its settings.
func (r Role) Command() string {
	if r == Witness {
		return "kedge server --witness"
	}
	return "kedge " + string(r)
}

// Admits reports whether a token or a secret for the role admits a machine with another one: a server gets everything that a
// witness gets.
func (r Role) Admits(other Role) bool { return r == other || r == Server && other == Witness }

// tokenCommand is the command that makes a token for the role.
func (r Role) tokenCommand() string {
	if r == Agent {
		return "kedge token create"
	}
	return "kedge token create --role " + string(r)
}
