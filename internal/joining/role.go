package joining

// Role is what a machine joins as.
type Role string

// The roles. A server has a node too, unless that is disabled.
const (
	Agent  Role = "agent"
	Server Role = "server"
)

// tokenCommand is the command that makes a token for the role.
func (r Role) tokenCommand() string {
	if r == Server {
		return "kedge token create --role server"
	}
	return "kedge token create"
}
