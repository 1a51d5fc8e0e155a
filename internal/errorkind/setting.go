package errorkind

import "fmt"

// SettingError says what is wrong with a setting, or with two that contradict each other.
type SettingError struct {
	Name string // of the setting, without dashes
	Item string // the item of a list that the error is about; empty if it is about the whole value
	text error  // what follows the setting's name

	Other string // a second setting; empty if there is none
	after error  // what follows its name
}

// BadSetting returns an error whose text is the setting's name and what format says after it: begin the format with a space or a
// colon. The format may wrap errors with %w.
func BadSetting(name, format string, args ...any) *SettingError {
	return &SettingError{Name: name, text: fmt.Errorf(format, args...)}
}

// BadItem is [BadSetting] for one item of a list.
func BadItem(name, item, format string, args ...any) *SettingError {
	return &SettingError{Name: name, Item: item, text: fmt.Errorf(format, args...)}
}

// BadSettings returns an error about two settings. Its text is the first name, the word "and" with what the first setting says
// before it, the second name, and the text of the format.
func BadSettings(name, value, other, format string, args ...any) *SettingError {
	and := " and "
	if value != "" {
		and = " " + value + and
	}
	return &SettingError{Name: name, Item: value, text: fmt.Errorf("%s", and), Other: other, after: fmt.Errorf(format, args...)}
}

// Error is the text with the settings as flags.
func (e *SettingError) Error() string { return e.Text(func(name string) string { return "--" + name }) }

// Text is the text with the settings as called names them.
func (e *SettingError) Text(called func(name string) string) string {
	text := called(e.Name) + e.text.Error()
	if e.Other != "" {
		text += called(e.Other) + e.after.Error()
	}
	return text
}

// Unwrap returns the errors that the formats wrap.
func (e *SettingError) Unwrap() []error {
	if e.after == nil {
		return []error{e.text}
	}
	return []error{e.text, e.after}
}
