package componentflags

import (
	"fmt"

	logsapi "k8s.io/component-base/logs/api/v1"

	"kedge/internal/logging"
)

// ApplyVerbosity makes v and vmodule of a component take effect. from is as in [Merge].
func ApplyVerbosity(c *logsapi.LoggingConfiguration, from string) error {
	files := map[string]int{}
	for _, item := range c.VModule {
		files[item.FilePattern] = int(item.Verbosity)
	}
	if err := logging.Verbose(int(c.Verbosity), files); err != nil {
		return fmt.Errorf("%s: %w", from, err)
	}
	return nil
}
