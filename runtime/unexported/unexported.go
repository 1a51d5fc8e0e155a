// Package unexported reaches fields of upstream's structs that are not exported, where upstream offers no other way.
//
// It is the last resort: every use is named in the file that makes it, with what fails when upstream changes the
// struct. A field that is not there, or has another type, is an error and never a guess. Only agent and runtime may
// import it.
package unexported

import (
	"fmt"
	"reflect"
	"unsafe"
)

// Field returns the address of the field name of the struct that v leads to, through interfaces and pointers. The
// struct must be addressable and the field have exactly the type T.
func Field[T any](v reflect.Value, name string) (*T, error) {
	for v.Kind() == reflect.Interface || v.Kind() == reflect.Pointer {
		v = v.Elem()
	}
	if v.Kind() != reflect.Struct || !v.CanAddr() {
		return nil, fmt.Errorf("looked for field %s in a %s, which is not an addressable struct", name, v.Kind())
	}
	f := v.FieldByName(name)
	if want := reflect.TypeFor[T](); !f.IsValid() || f.Type() != want {
		return nil, fmt.Errorf("%s has no field %s of type %s", v.Type(), name, want)
	}
	return (*T)(unsafe.Pointer(f.UnsafeAddr())), nil
}
