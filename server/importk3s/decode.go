package importk3s

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"

	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions"
	"k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/install"
	apiextensionsv1 "k8s.io/apiextensions-apiserver/pkg/apis/apiextensions/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/client-go/kubernetes/scheme"
)

// notObjects are prefixes of keys whose values are notes of the API server to itself.
var notObjects = []string{registry + "masterleases/", registry + "ranges/"}

// decoder decodes the objects in a store.
type decoder struct {
	types  *runtime.Scheme
	codecs serializer.CodecFactory
}

func newDecoder() decoder {
	types := runtime.NewScheme()
	if err := scheme.AddToScheme(types); err != nil {
		panic(err) // two types of Kubernetes with the same name: a mistake in the program
	}
	install.Install(types) // definitions, in all versions and with the conversions
	return decoder{types, serializer.NewCodecFactory(types)}
}

// decodeAll decodes values.
func decodeAll(ctx context.Context, values []stored, d *decrypter) *Snapshot {
	decoder := newDecoder()
	s := &Snapshot{}
	for _, v := range values {
		if hasAnyPrefix(v.key, notObjects) {
			continue
		}
		data, err := d.read(ctx, v)
		var u *unstructured.Unstructured
		if err == nil {
			u, err = decoder.decode(data)
		}
		if reason, ok := reasonOfGone(err); ok {
			s.unread = append(s.unread, Entry{Kind: "key", Name: v.key, Outcome: LeftOut, Reason: reason})
			continue
		}
		if err != nil {
			s.unread = append(s.unread, Entry{Kind: "key", Name: v.key, Outcome: Failed, Reason: err.Error()})
			continue
		}
		s.objects = append(s.objects, &object{u, v.key})
	}
	return s
}

// decode decodes an object: Kubernetes' own types are in protobuf, custom resources and their definitions in JSON.
func (d decoder) decode(data []byte) (*unstructured.Unstructured, error) {
	u := &unstructured.Unstructured{}
	switch {
	case bytes.HasPrefix(data, []byte("k8s\x00")):
		typed, kind, err := d.codecs.UniversalDeserializer().Decode(data, nil, nil)
		if runtime.IsNotRegisteredError(err) && kind != nil {
			return nil, goneError{*kind}
		}
		if err != nil {
			return nil, err
		}
		if u.Object, err = runtime.DefaultUnstructuredConverter.ToUnstructured(typed); err != nil {
			return nil, err
		}
		u.SetGroupVersionKind(*kind)
	case bytes.HasPrefix(data, []byte("{")):
		if err := u.UnmarshalJSON(data); err != nil {
			return nil, err
		}
	default:
		return nil, errors.New("it is neither an object in protobuf nor in JSON")
	}
	if u.GetName() == "" {
		return nil, errors.New("it has no name")
	}
	if kind := u.GroupVersionKind(); kind.Kind == "CustomResourceDefinition" && kind.Group == apiextensions.GroupName {
		return d.convert(u, apiextensionsv1.SchemeGroupVersion)
	}
	return u, nil
}

// goneError is the error for an object of a type that Kubernetes has no more.
type goneError struct{ kind schema.GroupVersionKind }

func (e goneError) Error() string {
	return fmt.Sprintf("Kubernetes has no type %s any more; in k3s, read and replace the object once with kubectl", e.kind)
}

// reasonOfGone returns why an object with a type of the past is left out, if nothing of its kind is imported anyway.
func reasonOfGone(err error) (string, bool) {
	var gone goneError
	if !errors.As(err, &gone) {
		return "", false
	}
	reason, ok := leftKinds[gone.kind.GroupKind()]
	return reason, ok
}

// convert converts a definition to a version. The API server stores definitions in v1beta1, which it has not served since
// Kubernetes 1.22.
func (d decoder) convert(u *unstructured.Unstructured, to schema.GroupVersion) (*unstructured.Unstructured, error) {
	if u.GroupVersionKind().GroupVersion() == to {
		return u, nil
	}
	data, err := u.MarshalJSON()
	if err != nil {
		return nil, err
	}
	internal, _, err := d.codecs.UniversalDecoder(apiextensions.SchemeGroupVersion).Decode(data, nil, nil)
	if err != nil {
		return nil, err
	}
	typed, err := d.types.ConvertToVersion(internal, to)
	if err != nil {
		return nil, err
	}
	out := &unstructured.Unstructured{}
	if out.Object, err = runtime.DefaultUnstructuredConverter.ToUnstructured(typed); err != nil {
		return nil, err
	}
	out.SetGroupVersionKind(to.WithKind(u.GetKind()))
	return out, nil
}

func hasAnyPrefix(s string, prefixes []string) bool {
	for _, p := range prefixes {
		if strings.HasPrefix(s, p) {
			return true
		}
	}
	return false
}
