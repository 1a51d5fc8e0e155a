// Package settings has every setting of kedge once: its name, its short form, the roles that have it, the type
// of its value, its default, its help, and its check. Flags, environment variables, keys of configuration
// files, the reference page, completion, the settings that an agent gets from its server and the settings that
// must be equal on all servers are derived from the rows in rows.go. To add a setting, add a row there and read
// it where it is used.
//
// The package reads nothing of the machine but the given configuration files, runs nothing, and imports no
// component of kedge. The packages command and assembly may import it.
package settings
