package componentflags

import (
	logsapi "k8s.io/component-base/logs/api/v1"

	"kedge/internal/errorkind"
	"kedge/internal/logging"
)

// ApplyVerbosity applies the flags v and vmodule of a component. from is as in [Merge].
func ApplyVerbosity(c *logsapi.LoggingConfiguration, from string) error {
	files := map[string]int{}
	for _, item := range c.VModule {
		files[item.FilePattern] = int(item.Verbosity)
	}
	if err := logging.Verbose(int(c.Verbosity), files); err != nil {
		return errorkind.BadSetting(from, ": %w", err)
	}
	return nil
}
